# SPDX-License-Identifier: MIT
"""afpq: 2- to 4-bit weights with a scale for each sign. Importing it registers the Transformers plug-in."""

from afpq.algorithms.solver_options import AwqOptions, GptqOptions
from afpq.errors import AfpqError
from afpq.integrations.transformers import AfpqConfig
from afpq.jobs.export import export
from afpq.jobs.finish_directory import Outcome
from afpq.jobs.import_bitsandbytes import import_model
from afpq.jobs.prepare import CalibrationSettings
from afpq.jobs.quantize_checkpoint import quantize
from afpq.kernels import set_compute
from afpq.model.embedding import AfpqEmbedding
from afpq.model.linear import AfpqLinear
from afpq.moved import keep_old_names
from afpq.numerics.formats import Format, custom_format, parse_format
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme, parse_scheme
from afpq.recipe import Recipe
from afpq.version import __version__

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

keep_old_names()
