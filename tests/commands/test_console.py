# SPDX-License-Identifier: MIT
"""What is printed of plans and outcomes."""

from __future__ import annotations

import pytest

from afpq.commands.console import print_estimate
from afpq.jobs.estimate import Estimate


def test_an_estimate_names_scratch_files_only_if_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    print_estimate(Estimate(10**9, 0, 5))
    print_estimate(Estimate(10**9, 10**6, 5))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("of memory, 5 s") and "of scratch files, 5 s" in second
