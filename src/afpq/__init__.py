# SPDX-License-Identifier: MIT
"""afpq: 2- to 4-bit weights with a scale for each sign. Importing it registers the Transformers plug-in.

It imports neither torch nor Transformers by itself: public names come from their modules when they are first used, and
the plug-in is registered as soon as Transformers is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from afpq.errors import AfpqError
from afpq.integrations.registration import register_when_imported
from afpq.moved import keep_old_names
from afpq.version import __version__

if TYPE_CHECKING:
    from afpq.algorithms.solver_options import AwqOptions as AwqOptions
    from afpq.algorithms.solver_options import GptqOptions as GptqOptions
    from afpq.integrations.transformers import AfpqConfig as AfpqConfig
    from afpq.jobs.export import export as export
    from afpq.jobs.finish_directory import Outcome as Outcome
    from afpq.jobs.import_bitsandbytes import import_model as import_model
    from afpq.jobs.prepare import CalibrationSettings as CalibrationSettings
    from afpq.jobs.quantize_checkpoint import quantize as quantize
    from afpq.kernels import set_compute as set_compute
    from afpq.model.embedding import AfpqEmbedding as AfpqEmbedding
    from afpq.model.linear import AfpqLinear as AfpqLinear
    from afpq.numerics.formats import Format as Format
    from afpq.numerics.formats import custom_format as custom_format
    from afpq.numerics.formats import parse_format as parse_format
    from afpq.numerics.groups import QuantizedWeight as QuantizedWeight
    from afpq.numerics.scheme import Scheme as Scheme
    from afpq.numerics.scheme import parse_scheme as parse_scheme
    from afpq.recipe import Recipe as Recipe

# Public name -> its module, which is imported when the name is first used.
_PLACES = {
    "AfpqConfig": "integrations.transformers",
    "AfpqEmbedding": "model.embedding",
    "AfpqLinear": "model.linear",
    "AwqOptions": "algorithms.solver_options",
    "CalibrationSettings": "jobs.prepare",
    "Format": "numerics.formats",
    "GptqOptions": "algorithms.solver_options",
    "Outcome": "jobs.finish_directory",
    "QuantizedWeight": "numerics.groups",
    "Recipe": "recipe",
    "Scheme": "numerics.scheme",
    "custom_format": "numerics.formats",
    "export": "jobs.export",
    "import_model": "jobs.import_bitsandbytes",
    "parse_format": "numerics.formats",
    "parse_scheme": "numerics.scheme",
    "quantize": "jobs.quantize_checkpoint",
    "set_compute": "kernels",
}

__all__ = [
    "AfpqConfig",
    "AfpqEmbedding",
    "AfpqError",
    "AfpqLinear",
    "AwqOptions",
    "CalibrationSettings",
    "Format",
    "GptqOptions",
    "Outcome",
    "QuantizedWeight",
    "Recipe",
    "Scheme",
    "__version__",
    "custom_format",
    "export",
    "import_model",
    "parse_format",
    "parse_scheme",
    "quantize",
    "set_compute",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"afpq.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


keep_old_names()
register_when_imported()
