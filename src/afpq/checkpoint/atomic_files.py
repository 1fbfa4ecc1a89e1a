# SPDX-License-Identifier: MIT
"""Write files whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest_value(value: object) -> str:
    """Return a digest of any JSON value; other objects, such as paths, count by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all. Raises OSError."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises OSError."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe accepts it; a directory raises
        path.write_bytes(content)
        return
    torn = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with open(torn, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(torn, path)
    except BaseException:
        torn.unlink(missing_ok=True)
        raise
