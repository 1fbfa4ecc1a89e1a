# SPDX-License-Identifier: MIT
"""Text to tokens to windows, and a clear error for every text that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from afpq import AfpqError
from afpq.evaluation.text import read_text, sample_windows, tokenize, windows


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    text = "Größe\n\n  naïve ☃ \U0001f600\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_text(tmp_path / "a.txt", None) == text
    assert read_text(str(tmp_path / "a.txt"), None) == text


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xff\xfe", b"abc\x80"])
def test_a_file_without_text_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(AfpqError, match=r"bad\.txt"):
        read_text(tmp_path / "bad.txt", None)


def test_a_missing_file_and_a_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match=r"none\.txt"):
        read_text(tmp_path / "none.txt", None)
    with pytest.raises(AfpqError, match=tmp_path.name):
        read_text(tmp_path, None)
    with pytest.raises(AfpqError):
        read_text("a" * 300, None)


def test_one_source_of_text_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(AfpqError, match="--text"):
        read_text(None, None)
    with pytest.raises(AfpqError, match="--text"):
        read_text(tmp_path / "a.txt", "wikitext2")


def test_an_unknown_dataset_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(AfpqError, match="wikitext2, ptb, c4"):
        read_text(None, "wikipedia")


def test_a_dataset_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AfpqError, match=r"afpq\[eval\]"):
        read_text(None, "wikitext2")


@given(st.text(max_size=50))
def test_tokens_of_a_byte_level_tokenizer_are_the_bytes(tokenizer_of_bytes: object, text: str) -> None:
    tokens = tokenize(tokenizer_of_bytes, text)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (len(text.encode()),))
    assert tokenizer_of_bytes.decode(tokens) == text  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def tokenizer_of_bytes(tiny_model_dir: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@given(st.integers(2, 60), st.integers(2, 70), st.none() | st.integers(2, 80))
def test_windows_cut_the_stream_and_drop_the_rest(count: int, length: int, limit: int | None) -> None:
    tokens = torch.arange(count)
    found = windows(tokens, length, limit)
    used = min(count, limit or count)
    size = min(length, used)
    assert found.shape == (used // size, size)
    assert torch.equal(found.flatten(), tokens[: used // size * size])


def test_windows_by_hand() -> None:
    tokens = torch.arange(11)
    assert windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(tokens, 4, 7).tolist() == [[0, 1, 2, 3]]
    assert windows(tokens, 100).tolist() == [list(range(11))]
    assert windows(tokens, 5, 10**9).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(("count", "length", "limit"), [(0, 8, None), (1, 8, None), (9, 8, 1), (9, 8, 0), (9, 8, -3)])
def test_too_few_tokens_are_an_error(count: int, length: int, limit: int | None) -> None:
    with pytest.raises(AfpqError, match="token"):
        windows(torch.arange(count), length, limit)


@pytest.mark.parametrize("length", [1, 0, -5])
def test_windows_too_short_to_predict_anything_are_an_error(length: int) -> None:
    with pytest.raises(AfpqError, match="length"):
        windows(torch.arange(20), length)


def test_calibration_windows_are_seeded_and_spread_over_the_text() -> None:
    tokens = torch.arange(1000)
    drawn = sample_windows(tokens, 10, 32, seed=3)
    assert drawn.shape == (10, 32) and torch.equal(drawn, sample_windows(tokens, 10, 32, seed=3))
    assert not torch.equal(drawn, sample_windows(tokens, 10, 32, seed=4))
    assert (drawn == drawn[:, :1] + torch.arange(32)).all()  # windows of the stream, unchanged
    starts = drawn[:, 0]
    part = (1000 - 32 + 1) / 10
    assert ((starts // part).long() == torch.arange(10)).all()  # one in each tenth


def test_calibration_text_shorter_than_a_window_is_used_whole() -> None:
    assert torch.equal(sample_windows(torch.arange(5), 8, 32, seed=0), torch.arange(5)[None])
    with pytest.raises(AfpqError, match="calibration text"):
        sample_windows(torch.arange(1), 8, 32, seed=0)


@pytest.mark.parametrize(("calibration", "split"), [(False, "test"), (True, "train")])
def test_calibration_never_reads_the_split_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, calibration: bool, split: str
) -> None:
    asked: list[str] = []

    def load_dataset(path: str, configuration: str, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append(split)
        return [{"text": "some"}, {"text": "words"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text(None, "wikitext2", calibration) == "some\n\nwords"
    assert asked == [split]
