# SPDX-License-Identifier: MIT
"""`afpq verify`: are the files of a model what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afpq.commands.options import JsonOption, command
from afpq.commands.output import check_json_place, errors, progress_bar, results, save_json
from afpq.errors import AfpqError

DirectoryArgument = Annotated[str, typer.Argument(help="A directory that afpq wrote, or the id of one on the hub.")]
MOST = 20  # differences printed; --json has all


@command("verify")
def verify_command(directory: DirectoryArgument, json: JsonOption = None) -> None:
    """Compare every tensor of a finished model, and its config, with the checksums kept when it was written."""
    from afpq.checkpoint.integrity import verify
    from afpq.evaluation.tables import size_text

    check_json_place(json)
    with progress_bar("start") as advance:
        found = verify(directory, advance)
    save_json(json, {"model": directory, **found.to_json()})
    if found.intact:
        results.print(f"{Path(directory).name or directory}: all {found.tensors} tensors are as they were written")
        results.print(f"{size_text(found.bytes)} read; the quantization_config is as it was written too")
        return
    if len(found.differences) > 1:
        for difference in found.differences[:MOST]:
            errors.print(_plain(str(difference)))
    raise AfpqError(f"{directory}: not as it was written: {found.differences[0]} ({len(found.differences)} in all)")


def _plain(text: str) -> str:
    """Names from files are foreign: none may move the cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
