# SPDX-License-Identifier: MIT
"""Other quantizers: those that are installed approximate a weight, and count the bytes they need."""

from __future__ import annotations

import pytest
import torch

from afpq import AfpqError
from afpq.comparison import peers as module
from afpq.comparison.peers import PEERS, Peer, approximate, installed_peers, missing_packages

TRUE_BITS = {
    "nf4-b64": 4.5, "fp4-b64": 4.5, "nf4-b64-dq": 4.127,
    "4bit-g64": 4.5, "4bit-g128": 4.25, "3bit-g64": 3.708, "int4-asym-g128": 4.1875,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # theirs, not ours
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.package}-{peer.scheme}")
def test_an_installed_peer_is_near_the_weight_at_its_bits(peer: Peer) -> None:
    pytest.importorskip(peer.package)
    weight = 0.02 * torch.randn(256, 768, generator=torch.Generator().manual_seed(0))
    back, stored = approximate(peer, "layer", weight)
    assert back.shape == weight.shape and back.dtype == weight.dtype
    assert 8 * stored / weight.numel() == pytest.approx(TRUE_BITS[peer.scheme], abs=0.001)
    assert 0 < (back - weight).square().sum() / weight.square().sum() < 0.05


def test_without_any_peer_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Peer("x", "no-such-package-at-all", lambda weight: (weight, 0), 1)
    monkeypatch.setattr(module, "PEERS", (absent,))
    with pytest.raises(AfpqError, match=r"no-such-package-at-all.*pip install"):
        installed_peers()
    assert missing_packages() == ["no-such-package-at-all"]


def test_another_tools_trouble_names_tool_and_layer() -> None:
    def fail(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        raise RuntimeError("no\nluck")

    with pytest.raises(AfpqError, match=r"layer\.3: tool x failed: RuntimeError: no luck"):
        approximate(Peer("x", "tool", fail, 1), "layer.3", torch.ones(2, 2))
    with pytest.raises(AfpqError, match="rows of 2"):
        approximate(Peer("x", "tool", fail, 64), "layer.3", torch.ones(2, 2))
