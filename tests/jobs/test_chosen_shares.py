# SPDX-License-Identifier: MIT
"""The table of chosen schemes: every chosen layer is counted once, and the bits are those of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from budget_jobs import chosen as chosen  # the fixture

from afpq.jobs.chosen_shares import SHARES, share_cells, shares
from afpq.jobs.prepare import Job


def test_shares_add_up_to_the_plan(chosen: tuple[Job, Path]) -> None:
    job, _ = chosen
    assert job.choice is not None
    found = shares(job.choice, job.plan)
    assert len(found) > 1 and [share.bits for share in found] == sorted(share.bits for share in found)
    assert {share.scheme for share in found} == set(job.choice.layers().values())
    weights = sum(share.elements for share in found)
    assert weights == sum(target.elements for target in job.plan.targets)
    assert 8 * sum(share.bytes for share in found) / weights == pytest.approx(job.plan.bits_per_weight)
    for share in found:
        assert sum(share.kinds.values()) == share.layers == list(job.choice.layers().values()).count(share.scheme)


def test_the_table_has_a_row_for_each_scheme(chosen: tuple[Job, Path]) -> None:
    job, _ = chosen
    assert job.choice is not None
    rows = share_cells(job.choice, job.plan)
    assert [row[0] for row in rows] == [str(share.scheme) for share in shares(job.choice, job.plan)]
    assert all(len(row) == len(SHARES) for row in rows)
    assert sum(float(row[3].removesuffix(" %")) for row in rows) == pytest.approx(100, abs=0.1 * len(rows))
    assert sum(int(row[2]) for row in rows) == 14
    for row in rows:
        assert sum(int(kind.split()[1]) for kind in row[4].split(", ")) == int(row[2])
