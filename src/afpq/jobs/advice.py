# SPDX-License-Identifier: MIT
"""Advice after a run: whether its figures call for calibration, and by which command.

The thresholds are from docs/LOG.md (lm6m, WikiText-2, "First path" and "--method tune"). Rounding to nearest at 4 bits
gave a KL of 0.0058 to 0.0095 in every format, at 3 bits 0.0277 to 0.0537; GPTQ at 3 bits 0.0087 to 0.0157. So 0.02
stands between all results that no calibration would much improve and all that it halved; the demo model's 0.009 to
0.014 at 4 bits and 0.042 to 0.065 at 3 bits are on the same sides. SmolLM2 as nf3 by rounding,
29.6 to 71.2 in perplexity, is far beyond it.
"""

from __future__ import annotations

from afpq.algorithms.methods import METHODS, NEAREST
from afpq.checkpoint.plan import Plan
from afpq.jobs.card_sample import CardFigures

BAD_KL = 0.02  # nats a token
FEW_BITS = 3  # of a code: at so many and fewer, rounding to nearest is beyond BAD_KL in every format measured
# The methods that need text, each better than those before it at equal bits.
BETTER = tuple(name for name, m in METHODS.items() if m.calibrated and not m.scales_channels)


def advice(plan: Plan, measured: CardFigures | str | None, calibrates: bool = True) -> str | None:
    """Return one line of advice; None if nothing calls for it, or if nothing is quantized.

    `measured`: the card's figures, or why there are none; None before a run. `calibrates`: whether the architecture
    can be calibrated.
    """
    if not plan.targets:
        return None
    method, bits = plan.recipe.method, code_bits(plan)
    if isinstance(measured, CardFigures):
        kl = measured.result.kl_divergence or 0.0
        if kl <= BAD_KL:
            return None
        finding = f"KL {kl:.3f} from the original is much (above {BAD_KL:g}), " + (
            f"perplexity {measured.original:.2f} became {measured.result.perplexity:.2f}"
        )
    elif method == NEAREST and bits <= FEW_BITS:
        finding = f"{bits:.2g} bits by rounding to nearest lose much, as a rule"
    else:
        return None
    better = _better(method) if calibrates else None
    if better is not None:
        return f"{finding}: calibration is called for, --method {better} --text FILE"
    return f"{finding}: more bits are called for, such as --format nf4 or a smaller --group-size"


def code_bits(plan: Plan) -> float:
    """Return the mean bits of a code, scales not included, over the quantized weights."""
    targets = plan.block_targets or plan.targets
    return sum(t.scheme.format.bits * t.elements for t in targets) / sum(t.elements for t in targets)


def _better(method: str) -> str | None:
    """Return the next better method; None for the best."""
    if method in BETTER:
        place = BETTER.index(method) + 1
        return BETTER[place] if place < len(BETTER) else None
    return BETTER[-1] if METHODS[method].calibrated else BETTER[0]
