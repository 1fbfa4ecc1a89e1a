# SPDX-License-Identifier: MIT
"""`afpq export`: to and from the checkpoints of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afpq.commands.common import JsonOption, ModelArgument, TrustOption, app
from afpq.console import check_json_place, console, progress_bar, quiet_transformers, save_json, size_text

OutArgument = Annotated[Path, typer.Argument(help="The directory to create.")]


@app.command("export")
def export_command(
    model: ModelArgument,
    out: OutArgument,
    to: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. [default: as the rest of the model]")] = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a quantized checkpoint as an ordinary one, which loads without afpq."""
    from afpq.export_model import export

    check_json_place(json)
    with quiet_transformers(), progress_bar("start") as advance:
        result = export(model, out, to, trust_remote_code=trust_remote_code, progress=advance)
    console.print(
        f"wrote {out}: {size_text(result.output_bytes)} (was {size_text(result.input_bytes)}), "
        f"{result.layers} linears dequantized, everything in {result.dtype}"
        + (f" but {len(result.kept)} tensors that the model keeps wider" if result.kept else "")
    )
    save_json(json, {"model": model, "out": str(out), **result.to_json()})
