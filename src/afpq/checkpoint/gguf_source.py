# SPDX-License-Identifier: MIT
"""A GGUF file as a directory: config.json and tokenizer that Transformers makes of its header, in a temporary place.

The weights stay in the file; `gguf_tensors` reads them from there, one by one.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
)

from afpq.errors import AfpqError, one_line

SUFFIX = ".gguf"
LINK = f"weights{SUFFIX}"  # to the file, next to what was made of its header
_made: dict[Path, Path] = {}  # directory -> the GGUF file it was made of
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # GGUF's types that are floats as they are


def gguf_directory(path: Path) -> Path | None:
    """The directory made of a GGUF file, which lives as long as the process; None for a path that is none.

    Raises AfpqError where the file cannot be read or the gguf package is missing, and for a directory that holds
    GGUF files and no config.json.
    """
    if path.is_dir() and not (path / "config.json").exists():
        found = next(iter(sorted(path.glob(f"*{SUFFIX}"))), None)
        if found is not None:
            raise AfpqError(f"{path}: no config.json in it; give the GGUF file itself: {found}")
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return None
    stat = path.stat()
    return _unpacked(path.resolve(), stat.st_size, stat.st_mtime_ns)


def gguf_file_of(directory: Path) -> Path | None:
    """The GGUF file that `directory` was made of by `gguf_directory`; None for any other."""
    return _made.get(directory)


@contextmanager
def gguf_errors(file: Path) -> Iterator[None]:
    """Turns whatever the gguf package or Transformers raises over a file into one AfpqError that names it."""
    try:
        yield
    except AfpqError:
        raise
    except ImportError as error:
        raise AfpqError(f"{file}: reading GGUF files needs a package: pip install gguf ({error})") from None
    except Exception as error:  # files are foreign input: every reader stumbles over them its own way
        reason = one_line(error, 300) or type(error).__name__
        raise AfpqError(f"{file}: Transformers cannot read it: {reason}") from None


def open_reader(file: Path) -> Any:
    """The header of a GGUF file, by the gguf package. Raises AfpqError where it is missing or refuses the file."""
    with gguf_errors(file):
        import gguf

        reader = gguf.GGUFReader(file)
        count = reader.get_field("split.count")
        if count is not None and count.contents() > 1:
            raise AfpqError(f"{file}: one of {count.contents()} parts; merge them first: llama-gguf-split --merge")
        if reader.byte_order == "S":
            raise AfpqError(f"{file}: its numbers are in the byte order of another machine")
        return reader


@lru_cache
def _unpacked(file: Path, size: int, changed: int) -> Path:
    """`size` and `changed` tell a file from another of the same name."""
    reader = open_reader(file)
    place = Path(tempfile.mkdtemp(prefix="afpq-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    directory = place / file.name  # messages name the directory
    directory.mkdir()
    (directory / LINK).symlink_to(file)
    with gguf_errors(file):
        config = AutoConfig.from_pretrained(directory, gguf_file=LINK)
        kinds = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        known = next((kind[type(config)] for kind in kinds if type(config) in kind), None)
        if known is None and not config.architectures:
            raise AfpqError(f"{file}: no model of Transformers writes text from a {config.model_type} config")
        if known is not None:
            config.architectures = [known.__name__]
        config.dtype = _float_type(reader)
        if "tokenizer.ggml.tokens" in reader.fields:
            AutoTokenizer.from_pretrained(directory, gguf_file=LINK).save_pretrained(directory)
        config.to_json_file(directory / "config.json")
    _made[directory] = file
    return directory


def _float_type(reader: Any) -> str:
    """The dtype of the result: that of the file's matrices where all have one, else bfloat16."""
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return PLAIN.get(types.pop(), "bfloat16") if len(types) == 1 else "bfloat16"
