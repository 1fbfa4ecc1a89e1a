# SPDX-License-Identifier: MIT
"""afpq: 3- and 4-bit weights with a scale for each sign. Importing it registers the Transformers plug-in."""

from afpq.api import quantize
from afpq.embedding import AfpqEmbedding
from afpq.errors import AfpqError
from afpq.export_model import export
from afpq.formats import Format, custom_format, parse_format
from afpq.groups import QuantizedWeight
from afpq.import_checkpoint import import_model
from afpq.integrations.transformers import AfpqConfig
from afpq.job import CalibrationSettings
from afpq.kernels import set_compute
from afpq.linear import AfpqLinear
from afpq.scheme import GptqOptions, Recipe, Scheme, parse_scheme
from afpq.version import __version__

__all__ = [
    "AfpqConfig",
    "AfpqEmbedding",
    "AfpqError",
    "AfpqLinear",
    "CalibrationSettings",
    "Format",
    "GptqOptions",
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
