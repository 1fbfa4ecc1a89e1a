# SPDX-License-Identifier: MIT
"""Load LoRA adapters of a quantized model's experts, which are linears, as they were saved.

PEFT turns the adapters of experts' linears into those of the fused parameter that a float model of Transformers 5 has,
and there is no hook for a model without one: so its conversion is wrapped, unchanged for all other models.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

from afpq.model.experts import find_experts

CONVERSIONS = "peft.utils.transformers_weight_conversion"
CONVERT = "convert_peft_adapter_state_dict_for_transformers"  # looked up in CONVERSIONS at each call


def wrap_adapter_conversion() -> None:
    """Wrap PEFT's conversion of an adapter's tensors, if this PEFT has one; call once."""
    try:
        conversions: Any = import_module(CONVERSIONS)
    except ImportError:
        return
    convert = getattr(conversions, CONVERT, None)
    if convert is None:
        return

    @wraps(convert)
    def unless_linears(model: Any, peft_config: Any, adapter_state_dict: Any, *rest: Any, **options: Any) -> Any:
        if find_experts(model):
            return adapter_state_dict
        return convert(model, peft_config, adapter_state_dict, *rest, **options)

    setattr(conversions, CONVERT, unless_linears)
