# SPDX-License-Identifier: MIT
"""Solvers: (weight [out, in], statistics, scheme) -> QuantizedWeight. Tensors in, tensors out, never a module."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afpq.algorithms.awq import search_channel_scales as search_channel_scales
    from afpq.algorithms.awq import search_clips as search_clips
    from afpq.algorithms.float_target import toward_float_outputs as toward_float_outputs
    from afpq.algorithms.gptq import SingularHessian as SingularHessian
    from afpq.algorithms.gptq import quantize_gptq as quantize_gptq
    from afpq.algorithms.guided_gptq import quantize_guided as quantize_guided
    from afpq.algorithms.layer_statistics import LayerStatistics as LayerStatistics
    from afpq.algorithms.rtn import quantize_rtn as quantize_rtn
    from afpq.algorithms.scheme_fitting import fit_scheme as fit_scheme

# Public name -> its module, which is imported when the name is first used.
_PLACES = {
    "LayerStatistics": "layer_statistics",
    "SingularHessian": "gptq",
    "fit_scheme": "scheme_fitting",
    "quantize_gptq": "gptq",
    "quantize_guided": "guided_gptq",
    "quantize_rtn": "rtn",
    "search_channel_scales": "awq",
    "search_clips": "awq",
    "toward_float_outputs": "float_target",
}

__all__ = [
    "LayerStatistics",
    "SingularHessian",
    "fit_scheme",
    "quantize_gptq",
    "quantize_guided",
    "quantize_rtn",
    "search_channel_scales",
    "search_clips",
    "toward_float_outputs",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"afpq.algorithms.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
