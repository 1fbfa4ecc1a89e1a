# SPDX-License-Identifier: MIT
"""Files next to the weights: an adapter is refused, and a copy that cannot be written is named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture

from afpq import AfpqError, export, quantize
from afpq.checkpoint.companions import companion_bytes, copy_companions, refuse_adapter
from afpq.checkpoint.reader import open_checkpoint


def test_an_adapter_is_refused_also_in_a_dry_run_and_alone(cli: Cli, tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "adapter_config.json").write_text("{}")
    for more in ((), ("--dry-run",)):
        assert_refused(cli("quantize", tiny_copy, tmp_path / "out", *more), "adapter_config.json", "merge")
    (tiny_copy / "model.safetensors").unlink()
    assert_refused(cli("quantize", tiny_copy, tmp_path / "out"), "adapter_config.json", "merge")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_file_of_an_adapter_is_copied(tiny_copy: Path, tmp_path: Path) -> None:
    """Without its config Transformers does not load it; it is no part of the model."""
    for name in ("adapter_model.safetensors", "adapter_model.bin", "adapter_notes.json"):
        (tiny_copy / name).write_bytes(b"{}")
    quantize(tiny_copy, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))


def test_an_export_would_drop_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "q")
    (tmp_path / "q" / "adapter_config.json").write_text("{}")
    with pytest.raises(AfpqError, match=r"adapter_config\.json"):
        export(tmp_path / "q", tmp_path / "out")
    refuse_adapter(tiny_model_dir)


def test_their_bytes_and_copies(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir)
    copy_companions(checkpoint, tmp_path)
    copies = list(tmp_path.iterdir())
    assert {path.name for path in copies} >= {"tokenizer.json", "tokenizer_config.json"}
    assert companion_bytes(checkpoint) == sum(path.stat().st_size for path in copies)
    assert all(path.read_bytes() == (tiny_model_dir / path.name).read_bytes() for path in copies)


def test_a_full_disk_names_the_copy_and_not_the_source(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(AfpqError) as error:
        quantize(tiny_model_dir, tmp_path / "out")
    assert f"{tmp_path / 'out.partial'}/" in str(error.value) and "No space left" in str(error.value)
    assert str(tiny_model_dir) not in str(error.value)


def test_one_that_cannot_be_read_is_named(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(AfpqError, match=rf"{tiny_copy}/.*: cannot read: Permission denied"):
        copy_companions(open_checkpoint(tiny_copy), tmp_path)
