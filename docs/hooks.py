# SPDX-License-Identifier: MIT
"""What mkdocs does beyond building pages: tables of the commands' options, the list of modules, and a check that pages
fetch nothing from other servers.

`<!-- options: NAME -->` in a page becomes the table of that command, made from the command line itself;
`<!-- modules -->` the rooms of the code with the reference of their modules (`rooms.py`).
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.afpq")  # a warning fails `mkdocs build --strict`
MODULES = "<!-- modules -->"
PLACE = re.compile(r"<!-- options: (\S+) -->")
# What a browser fetches by itself: sources, style sheets, fonts, imports; not links, which wait for a click.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\b(?:src|srcset)=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|dns-prefetch|icon))"""
    r"""[^>]*?\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:@import\s+|url\()\s*["']?((?:https?:)?//[^"'\s)]+)""",
    re.IGNORECASE,
)

_SEVERAL = re.compile(r"<list\[(\w+)\]>")  # an option that may be repeated


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables of options and the list of modules in their places."""
    if MODULES in markdown:
        sys.path.append(str(Path(__file__).parent))
        from rooms import modules_page

        markdown = markdown.replace(MODULES, modules_page())
    return PLACE.sub(lambda found: command_table(found[1]), markdown)


def on_post_build(config: Any) -> None:
    """Warns of every page or style sheet that would fetch something from another server."""
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in fetched_addresses(path.read_text("utf-8")):
                log.warning("%s fetches %s", path.relative_to(config["site_dir"]), address)


def fetched_addresses(text: str) -> list[str]:
    """Addresses on other servers that a browser would fetch to show this HTML or CSS."""
    return [next(filter(None, found)) for found in FETCHED.findall(text)]


def commands() -> dict[str, Any]:
    """Name -> Typer's command, in the order of `afpq --help`."""
    import typer

    from afpq.commands.application import app

    group = typer.main.get_command(app)
    found: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    return found


def command_table(name: str) -> str:
    """The usage line of a command, then a Markdown table: argument or option, default, meaning."""
    import typer

    command = commands()[name]
    context = typer.Context(command, info_name=f"afpq {name}")
    arguments = [parameter.name.upper() for parameter in command.params if parameter.param_type_name == "argument"]
    usage = " ".join(["afpq", name, *arguments, "[OPTIONS]"])
    lines = [f"```text\n{usage}\n```", "", "| | default | |", "|---|---|---|"]
    for parameter in command.params:
        words = parameter.get_help_record(context)[0]  # as --help writes it: --format <str>
        words = parameter.name.upper() if parameter.param_type_name == "argument" else _SEVERAL.sub(r"<\1> ...", words)
        lines.append(f"| `{words}` | {_default(parameter)} | {_escape(parameter.help or '')} |")
    return "\n".join(lines)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "*required*"
    if parameter.default is None or parameter.default == ():
        return ""
    if isinstance(parameter.default, bool):
        side = parameter.opts if parameter.default else parameter.secondary_opts
        return f"`{side[0]}`" if side else "off"
    return f"`{parameter.default}`"


def _escape(text: str) -> str:
    return re.sub(r"(--[\w-]+)", r"`\1`", text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*"))
