# SPDX-License-Identifier: MIT
"""A file is there whole, or as it was before."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from afpq.checkpoint.atomic_files import digest_value, write_json, write_whole


def test_json_is_utf8_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "größe", "values": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "größe", "values": [1, 2.5, None]}
    assert (tmp_path / "a.json").read_text("utf-8").endswith("}\n")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: int) -> None:
        raise OSError("the disk is gone")

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_whole(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_link_stays_and_its_target_gets_the_content(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"content"


def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", b"content")
    reader.join()
    assert read == [b"content"] and (tmp_path / "pipe").is_fifo()


def test_a_very_long_name_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]


def test_a_digest_does_not_depend_on_the_order_of_keys_but_on_every_value() -> None:
    value = {"a": 1, "b": [1.5, None, Path("x")]}
    assert digest_value(value) == digest_value(dict(reversed(value.items())))
    others = [
        {**value, "a": 2},
        {**value, "b": [None, 1.5, Path("x")]},
        {"a": 1},
        {**value, "b": [1.5, None, Path("y")]},
    ]
    assert len({digest_value(other) for other in [value, *others]}) == 5
