# SPDX-License-Identifier: MIT
"""The file of sensitivities: read back as written, and an error for a file of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afpq import AfpqError, parse_scheme
from afpq.calibration.sensitivity import GroupLosses
from afpq.jobs.sensitivity_file import losses_to_json, read_losses


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"groups": 3}', '{"measured_on": {}, "groups": [{}]}'])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(AfpqError, match=r"a\.json"):
        read_losses(tmp_path / "a.json", {"text": "x"})


def test_losses_are_read_back_as_written_if_measured_on_the_same(tmp_path: Path) -> None:
    file, key = tmp_path / "a.json", {"text": "x", "model": "y"}
    assert read_losses(file, key) is None
    groups = [GroupLosses(("a.q", "a.k"), (0.1, 1e-9)), GroupLosses(("b",), None)]
    file.write_text(
        json.dumps(losses_to_json([parse_scheme("nf3-asym-g64"), parse_scheme("int4-sym-g32")], groups, key))
    )
    assert read_losses(file, key) == groups
    assert json.loads(file.read_text())["candidates"] == ["nf3-asym-g64", "int4-sym-g32"]
    with pytest.raises(AfpqError, match=r"a\.json: sensitivities of another model; name another file"):
        read_losses(file, {"text": "x", "model": "z"})
