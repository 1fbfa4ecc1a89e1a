# SPDX-License-Identifier: MIT
"""`afpq generate`: continue a text, or chat, with a model that is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from afpq.commands.options import DeviceOption, ModelArgument, ThreadsOption, TrustOption, command
from afpq.commands.output import progress_bar, quiet_transformers, use_threads
from afpq.errors import AfpqError

if TYPE_CHECKING:
    from afpq.evaluation.generation import Message

STANDARD_INPUT = "-"


@command()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; - or, if standard input is no terminal, nothing: read from there."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer the prompt by the model's chat template; without one, turn by turn."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to add, at most. [default: 64; with --chat 1024]")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens at random, more evenly the higher; 0: the likeliest.")
    ] = 0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that have this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws. [default: another each time]")] = None,
    compute: Annotated[str, typer.Option(help="Arithmetic on a CPU: exact, or int8, which is faster.")] = "exact",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a text, or with --chat answer it; token by token, the likeliest unless a temperature is given."""
    if system is not None and not chat:
        raise AfpqError("--system is for --chat, which is not given")
    text = _given_prompt(prompt, chat)
    use_threads(threads)

    from afpq.evaluation.generation import Sampling, chat_inputs, prompt_inputs, require_template, stream
    from afpq.evaluation.loading import load_model, load_tokenizer
    from afpq.kernels import set_compute

    sampling = Sampling(temperature, top_p, seed)
    set_compute(compute)
    with quiet_transformers():
        with progress_bar("loading"):
            tokenizer = load_tokenizer(model, trust_remote_code)
            if chat:
                require_template(tokenizer)
            loaded = load_model(model, trust_remote_code, device)
        if not chat:
            assert text is not None
            count = 64 if max_new_tokens is None else max_new_tokens
            stream(loaded, tokenizer, prompt_inputs(tokenizer, text), count, sampling, _write)
            _write("\n")
            return

        def answer(messages: list[Message]) -> str:
            inputs, count = chat_inputs(tokenizer, messages), 1024 if max_new_tokens is None else max_new_tokens
            return stream(loaded, tokenizer, inputs, count, sampling, _write, skip_prompt=True)

        _converse(answer, system, text)


def _given_prompt(prompt: str | None, chat: bool) -> str | None:
    """The prompt, from standard input if it is to come from there; None for a chat at a terminal."""
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        if chat:
            return None
        raise AfpqError("no prompt: give the text to continue, or - to type it (Ctrl-D ends it), or --chat")
    try:
        if prompt is None or prompt == STANDARD_INPUT:
            prompt = "" if sys.stdin is None else sys.stdin.read().removesuffix("\n").removesuffix("\r")
        prompt.encode("utf-8")
    except UnicodeError:
        raise AfpqError("the prompt is not UTF-8 text") from None
    if not prompt:
        raise AfpqError("the prompt is empty; give at least one character")
    return prompt


def _converse(answer: Callable[[list[Message]], str], system: str | None, first: str | None) -> None:
    """Answer the first message, or every one that is typed until Ctrl-D."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            content = input("> ") if first is None else first
        except EOFError:
            _write("\n")
            return
        except UnicodeError:
            raise AfpqError("the message is not UTF-8 text") from None
        if not content.strip():
            continue
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer(messages)})
        _write("\n")
        if first is not None:
            return


def _write(text: str) -> None:
    """Print a piece of text at once, as it is."""
    print(text, end="", flush=True)
