# SPDX-License-Identifier: MIT
"""The rooms of the code: their order, and the picture and the list of modules that the documentation makes of them.

`python docs/rooms.py` writes docs/rooms.svg anew; a test fails while the two differ.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "afpq"
PICTURE = Path(__file__).with_name("rooms.svg")

# Folders, and files next to them, in reading order: each imports only itself and what stands before it.
ROOMS = (
    "errors", "version", "progress", "numerics", "kernels", "algorithms", "recipe", "model", "checkpoint",
    "calibration", "integrations", "evaluation", "demo", "jobs", "comparison", "moved", "__init__", "commands", "cli",
    "__main__",
)  # fmt: skip
FOLDERS = tuple(room for room in ROOMS if (SOURCE / room).is_dir())

ROW, LEFT, TOP, DOT, NAME, SENTENCE = 34, 16, 46, 24, 100, 700  # pixels
TEAL = "#0f766e"


def afpq_imports(text: str, modules: list[str]) -> Iterator[str]:
    """Every module of `modules` that a file with this text imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from a import b` means the module a.b if there is one, else a name in the module a
            longer = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("afpq.") in modules else str(node.module) for n in longer]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "afpq":
                yield name.removeprefix("afpq.") if name != "afpq" else "__init__"


def module_of(file: Path) -> str:
    """`algorithms/rtn.py` -> algorithms.rtn, `kernels/__init__.py` -> kernels, `__init__.py` -> __init__."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The first part of a module's name."""
    return module.partition(".")[0]


def module_texts() -> dict[str, str]:
    """Module -> source text, of the whole package."""
    return {module_of(file): file.read_text("utf-8") for file in sorted(SOURCE.rglob("*.py"))}


def first_sentence(text: str) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def modules_page() -> str:
    """Markdown: a heading and a sentence for each room, and the reference of its modules for mkdocstrings."""
    texts = module_texts()
    parts = []
    for room in FOLDERS:
        files = sorted(module for module in texts if room_of(module) == room and module != room)
        # Device code cannot be imported without Triton, PEFT's layers not without PEFT.
        shown = [m for m in files if m not in ("kernels.triton_kernels", "integrations.peft")]
        references = "\n\n".join(f"::: afpq.{module}" for module in shown)
        parts.append(f"## {room}\n\n{first_sentence(texts[room])}\n\n{references}")
    return "\n\n".join(parts)


def imports_of_rooms() -> dict[str, set[str]]:
    """Folder -> the rooms that its files import."""
    texts = module_texts()
    found: dict[str, set[str]] = {room: set() for room in FOLDERS}
    for module, text in texts.items():
        if room_of(module) in found:
            found[room_of(module)] |= set(map(room_of, afpq_imports(text, list(texts))))
    return found


def rooms_svg() -> str:
    """The rooms from top to bottom with what each is about; a dot for every earlier room that it imports."""
    texts, imports = module_texts(), imports_of_rooms()
    matrix = LEFT + NAME + SENTENCE
    width, height = matrix + DOT * len(FOLDERS) + 12, TOP + ROW * len(FOLDERS) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="The rooms of afpq in reading order" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(LEFT, 26, "Rooms in reading order: a room imports only rooms above it", "#475569"),
        _text(matrix + 4, 26, "imports", "#475569"),
    ]
    for row, room in enumerate(FOLDERS):
        y = TOP + ROW * row
        lines += [
            f'<rect x="{LEFT}" y="{y}" width="{NAME}" height="{ROW - 6}" rx="5" fill="{TEAL}"/>',
            _text(LEFT + 9, y + 18, room, "#ffffff"),
            _text(LEFT + NAME + 12, y + 18, first_sentence(texts[room]).replace("`", ""), "#0f172a"),
        ]
        for column, other in enumerate(FOLDERS[: row + 1]):
            title = f"<title>{room} imports {other}</title>" if other in imports[room] - {room} else ""
            radius, colour = (5, TEAL) if other == room else (4, "#64748b") if title else (1.5, "#cbd5e1")
            x = matrix + DOT * column + DOT / 2
            lines.append(f'<circle cx="{x:g}" cy="{y + 14}" r="{radius}" fill="{colour}">{title}</circle>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: int, y: int, text: str, colour: str) -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(rooms_svg(), "utf-8")
