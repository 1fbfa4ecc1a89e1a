# SPDX-License-Identifier: MIT
"""afpq_checksums.json: what every tensor of a result was when it was written, and what of its config decides values.

The checksums are those the self-test compares with, taken in memory before a tensor was written. They find damage and
mix-ups; whoever changes files on purpose can change this one too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afpq.checkpoint.atomic_files import digest_value, write_json
from afpq.checkpoint.reader import read_json
from afpq.errors import AfpqError
from afpq.numerics.packing import Spec

CHECKSUMS = "afpq_checksums.json"
VERSION = 1
ALGORITHM = "blake2b-128"
# The keys of quantization_config that decide which weights the tensors stand for; all others are a record.
DECIDING = (
    "quant_method", "version", "bits", "format", "group_size", "sym", "scale_dtype", "dynamic", "lm_head", "embedding",
    "modules_to_not_convert",
)  # fmt: skip


@dataclass(frozen=True)
class Checksums:
    """The content of the file: checksum and spec (`F16 96x1`) of each tensor, a digest of each key that decides.

    `tensors` and `specs` have the same names. `config` has no key for a model that is not quantized.
    """

    tensors: dict[str, str]
    specs: dict[str, str]
    config: dict[str, str]


def spec_text(spec: Spec) -> str:
    """`float16 96x1`; of a scalar `float16 -`. The checksum is of bytes alone, which say nothing of a shape."""
    dtype, shape = spec
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape)) or '-'}"


def config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """A digest for each deciding key of the quantization_config of this config.json; none if it has no such object."""
    keys = config.get("quantization_config")
    if not isinstance(keys, dict):
        return {}
    return {key: digest_value(keys[key])[:32] for key in DECIDING if keys.get(key) is not None}


def write_checksums(
    directory: Path, outputs: Mapping[str, Spec], digests: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write the file for tensors that were written as `outputs`, with their `digests`. Raises OSError."""
    content = {
        "version": VERSION,
        "algorithm": ALGORITHM,
        "tensors": {name: digests[name] for name in outputs},
        "specs": {name: spec_text(spec) for name, spec in outputs.items()},
        "quantization_config": config_digests(config),
    }
    write_json(directory / CHECKSUMS, content)


def read_checksums(directory: Path) -> Checksums:
    """The file of a directory. Raises AfpqError if it has none, one that is damaged, or one of a later version."""
    path = directory / CHECKSUMS
    if not path.exists():
        raise AfpqError(
            f"{directory}: has no {CHECKSUMS}: it was not written by afpq quantize, import or export, or by a version "
            "before there were checksums; nothing to compare with"
        )
    content = read_json(path)
    if content.get("version") != VERSION or content.get("algorithm") != ALGORITHM:
        found = f"version {content.get('version')!r}, {content.get('algorithm')!r}"
        raise AfpqError(f"{path}: {found[:80]}; this afpq reads version {VERSION}, {ALGORITHM!r}")
    tensors, specs, config = (_texts(path, content, key) for key in ("tensors", "specs", "quantization_config"))
    if tensors.keys() != specs.keys() or not all(map(_is_digest, [*tensors.values(), *config.values()])):
        raise AfpqError(f"{path}: damaged; its tensors and specs must be those of the same names")
    return Checksums(tensors, specs, config)


def _texts(path: Path, content: dict[str, Any], key: str) -> dict[str, str]:
    value = content.get(key)
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise AfpqError(f"{path}: damaged; {key} must be an object of texts")
    return value


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", text) is not None
