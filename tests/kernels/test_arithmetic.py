# SPDX-License-Identifier: MIT
"""The arithmetic of CPU layers is one choice for the process, by name."""

from __future__ import annotations

import pytest

from afpq import kernels
from afpq.errors import AfpqError
from afpq.kernels.arithmetic import MODES, compute_mode, set_compute


def test_the_choice_is_kept_and_the_one_before_returned() -> None:
    before = set_compute("int8")
    try:
        assert before == "exact" and compute_mode() == "int8"
        with pytest.raises(AfpqError, match="exact, int8"):
            set_compute("int4")
        assert compute_mode() == "int8"  # as it was
        assert [set_compute(mode) for mode in MODES] == ["int8", "exact"]
        assert kernels.set_compute is set_compute
    finally:
        set_compute(before)
