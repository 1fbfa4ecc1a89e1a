# SPDX-License-Identifier: MIT
"""`afpq export` and `afpq import`: to and from the checkpoints of others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from afpq.commands.options import JsonOption, ModelArgument, TrustOption, command
from afpq.commands.output import check_json_place, console, progress_bar, quiet_transformers, results, save_json
from afpq.evaluation.tables import size_text

OutArgument = Annotated[Path, typer.Argument(help="The directory to create.")]


@command("export")
def export_command(
    model: ModelArgument,
    out: OutArgument,
    to: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. [default: as the rest of the model]")] = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a quantized checkpoint as an ordinary one, which loads without afpq."""
    from afpq.jobs.export import export

    check_json_place(json)
    with quiet_transformers(), progress_bar("start") as advance:
        result = export(model, out, to, trust_remote_code=trust_remote_code, progress=advance)
    results.print(
        f"wrote {out}: {size_text(result.output_bytes)} (was {size_text(result.input_bytes)}), "
        f"{result.layers} linears dequantized, everything in {result.dtype}"
        + (f" but {len(result.kept)} tensors that the model keeps wider" if result.kept else "")
    )
    save_json(json, {"model": model, "out": str(out), **result.to_json()})


@command("import")
def import_command(
    model: ModelArgument,
    out: OutArgument,
    scale_dtype: Annotated[
        str | None, typer.Option(help="float16 or float32. [default: the smaller that loses nothing]")
    ] = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Take over a checkpoint that bitsandbytes quantized to 4 bits; its weights keep their values."""
    from afpq.jobs.import_bitsandbytes import import_model

    check_json_place(json)
    with quiet_transformers(), progress_bar("start") as advance:
        result = import_model(
            model, out, scale_dtype=scale_dtype, trust_remote_code=trust_remote_code, progress=advance
        )
    results.print(
        f"wrote {out}: {size_text(result.output_bytes)} (was {size_text(result.input_bytes)}), {result.layers} linears "
        f"of bitsandbytes {result.kind}, {result.bits_per_weight:.3f} true bits per quantized weight "
        f"(was {result.bits_before:.3f})"
    )
    for scheme, count in result.schemes.items():
        console.print(f"{count} linears as {re.sub(r'lut:.*(?=-a?sym-g)', 'lut', scheme)}")
    console.print("all weights as they were" if result.exact else "scales rounded to float16, which loses a little")
    console.print(f"self-test: every tensor was read back as it was computed. {result.self_test}")
    save_json(json, {"model": model, "out": str(out), **result.to_json()})
