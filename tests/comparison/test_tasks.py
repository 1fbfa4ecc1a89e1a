# SPDX-License-Identifier: MIT
"""What a comparison measures: checked before any work, each cell once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparisons import question

from afpq import AfpqError
from afpq.comparison.tasks import make_agenda

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown scheme": ({"schemes": ["nf4"]}, "nf4.*expected FORMAT"),
    "unknown format": ({"schemes": ["nf3-sym-g64", "nf9-sym-g64"]}, "nf9.*known"),
    "no scheme": ({"schemes": ["", " "]}, "--schemes"),
    "no method": ({"methods": [""]}, "--methods"),
    "unknown method": ({"methods": ["rtn", "magic"]}, "magic.*known"),
    "no calibration text": ({"methods": ["rtn", "gptq"]}, "gptq needs.*--calibration-text"),
    "a text shorter than a window": ({"text": "short"}, "5 tokens is shorter than a window of 32.*--seq-len"),
    "fewer tokens than a window": ({"max_tokens": 20}, "20 tokens is shorter than a window of 32"),
    "windows of one": ({"seq_len": 1}, "length"),
    "one token": ({"max_tokens": 1}, "at least 2"),
    "a text of one token": ({"text": "x"}, "at least 2"),
    "no model": ({"model": "/no/such/dir"}, "/no/such/dir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_are_refused_before_any_work(tiny_model_dir: Path, case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(AfpqError, match=words):
        make_agenda(replace(question(tiny_model_dir), **changes))


def test_schemes_named_twice_are_measured_once(tiny_model_dir: Path) -> None:
    agenda = make_agenda(question(tiny_model_dir, schemes=["nf3-sym-g64", " nf3-sym-g64"], methods=["rtn", "rtn"]))
    assert [str(task.cell) for task in agenda.tasks] == ["float", "nf3-sym-g64 rtn"]
