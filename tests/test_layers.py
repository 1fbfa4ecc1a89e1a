# SPDX-License-Identifier: MIT
"""The shape of the code: rooms that import only rooms before them, optional packages kept optional, short files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from rooms import PICTURE, ROOMS, afpq_imports, module_of, module_texts, room_of, rooms_svg

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "afpq"

MAX_IN_ROOT = 8

OPTIONAL = {
    "matplotlib", "datasets", "peft", "vllm", "triton", "lm_eval", "bitsandbytes", "hqq", "torchao",
    "accelerate", "gguf",
}  # fmt: skip
BEHIND = {
    "kernels.triton_kernels": {"triton"},
    "integrations.peft": {"peft"},
}  # modules that need an optional package, and are imported in functions only
# What a room must not touch: models and files are for those behind it.
FORBIDDEN = {
    "numerics": {"transformers", "safetensors", "huggingface_hub", "pathlib"},
    "algorithms": {"transformers", "safetensors", "huggingface_hub", "pathlib"},
    "kernels": {"transformers", "safetensors", "huggingface_hub"},
}
MAX_LINES, MAX_FUNCTION_LINES = 250, 60
# Files that are longer, at most five, each with the reason why it is not two.
LONGER = {
    "commands.quantize": "the signature is the command line: each option with its help",
    "integrations.peft": "overrides of two classes of PEFT that share their state",
    "integrations.transformers": "the plug-in's hooks in the order in which Transformers calls them",
    "jobs.prepare": "all that is checked and read before any work, in its order",
    "kernels.triton_kernels": "Triton compiles each kernel with the helpers of its own file",
}
# Tests are found by the name of the file they are about; these are about more than one, or about none.
OF_MANY = {
    "test_api", "test_bench_peers", "test_cli", "test_crossings", "test_disks", "test_docs", "test_families",
    "test_fuzz", "test_layers", "test_learned", "test_lora_example", "test_lora_families", "test_mixtures",
    "test_other_models", "test_reproduce_paper", "test_security", "kernels.test_csrc",
}  # fmt: skip
MISSING: set[str] = set()  # files without a test of their name
STRAY: set[str] = set()  # tests without a file of their name
# Tests about several small files that are one thing.
ABOUT = {
    "checkpoint.test_gguf": ("checkpoint.gguf_source", "checkpoint.gguf_tensors"),
    "checkpoint.test_low_precision": (
        "checkpoint.encoded", "checkpoint.float8_tensors", "checkpoint.mxfp4_tensors", "evaluation.decoded_weights",
    ),
    "checkpoint.test_checksums": ("checkpoint.integrity",),
    "integrations.test_guarded_saves": ("checkpoint.unaware_loaders",),
    "numerics.test_low_precision_decoding": ("numerics.float8_decoding", "numerics.mxfp4_decoding"),
}  # fmt: skip

FILES = sorted(SOURCE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))


MODULES = [module_of(file) for file in FILES]


def upward_imports(texts: dict[str, str], rooms: Sequence[str]) -> list[str]:
    """One line for every import from a room that does not come before the file's own; `texts` are by module."""
    return [
        f"{module} imports {imported}"
        for module, text in texts.items()
        for imported in afpq_imports(text, list(texts))
        if room_of(imported) not in rooms[: rooms.index(room_of(module)) + 1]
    ]


def circle(texts: dict[str, str]) -> list[str]:
    """The modules of one circle of imports, the first again at its end; none where there is no circle.

    A room's `__init__` re-exports its files, so an import of the room is not one of the `__init__`.
    """
    graph = {
        module: {imported for imported in afpq_imports(text, list(texts)) if imported in texts} - {room_of(module)}
        for module, text in texts.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those inside of functions: what runs when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def imported_packages(nodes: Iterator[ast.AST]) -> set[str]:
    packages: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(str(node.module).split(".")[0])
    return packages


def loads_pickles(text: str) -> bool:
    """Whether the code touches pickle, directly or through torch.load."""
    tree = ast.parse(text)
    return "pickle" in imported_packages(ast.walk(tree)) or any(
        (isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch")
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in [a.name for a in node.names])
        for node in ast.walk(tree)
    )


RUNS_DATA = {"eval", "exec", "compile", "__import__"}  # built-in functions; model.eval() and re.compile() are not
UNSAFE_PACKAGES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


def runs_what_it_reads(text: str) -> bool:
    """Whether the code can run data as code, or imports a package whose files can."""
    tree = ast.parse(text)
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    allows = any(isinstance(n, ast.keyword) and n.arg in ("allow_pickle", "weights_only") for n in ast.walk(tree))
    return bool(called & RUNS_DATA or imported_packages(ast.walk(tree)) & UNSAFE_PACKAGES or allows)


def name_of_tests(file: Path) -> str:
    """`tests/kernels/test_cpu.py` -> kernels.test_cpu."""
    return ".".join(file.relative_to(TESTS).with_suffix("").parts)


def about(test: str) -> str:
    """kernels.test_cpu -> kernels.cpu: the module that a module of tests is named after."""
    room, _, name = test.rpartition(".")
    return f"{room}.{name}".removeprefix(".").replace("test_", "", 1)


def covered(tests: set[str]) -> set[str]:
    """The modules that these modules of tests are about."""
    return {about(test) for test in tests} | {module for test in tests for module in ABOUT.get(test, ())}


def modules_and_tests() -> tuple[set[str], set[str]]:
    """(modules that need tests of their name, modules of tests that need a file of theirs); no `__init__`."""
    inside = {module_of(file) for file in FILES if file.parent != SOURCE and file.name != "__init__.py"}
    return inside, {name_of_tests(file) for file in TEST_FILES if file.name.startswith("test_")} - OF_MANY


def imported_tests(text: str) -> set[str]:
    """The modules of tests that a file imports, by any of their names."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if any(part.startswith("test_") for part in name.split(".")[:2])}


def test_every_room_has_its_place() -> None:
    assert sorted(ROOMS) == sorted({room_of(module) for module in MODULES})
    assert len(list(SOURCE.glob("*.py"))) <= MAX_IN_ROOT


def test_rooms_import_only_rooms_before_them() -> None:
    assert upward_imports(module_texts(), ROOMS) == []


def test_every_file_has_tests_of_its_name() -> None:
    modules, tests = modules_and_tests()
    assert modules - covered(tests) - MISSING == set()


def test_tests_are_named_after_the_file_they_are_about() -> None:
    modules, tests = modules_and_tests()
    root = {module_of(file) for file in SOURCE.glob("*.py")}
    assert {t for t in tests - ABOUT.keys() if about(t) not in modules | root} - STRAY == set()


def test_the_lists_of_exceptions_hold_no_more_than_they_must() -> None:
    modules, tests = modules_and_tests()
    assert modules & MISSING - covered(tests) == MISSING
    assert tests & STRAY == STRAY
    assert ABOUT.keys() <= tests and modules >= {module for about_these in ABOUT.values() for module in about_these}
    assert {name_of_tests(file) for file in TEST_FILES} >= OF_MANY


def test_no_file_imports_a_module_of_tests() -> None:
    """What tests share stands in a module that holds no tests."""
    found = {name_of_tests(file): imported_tests(file.read_text("utf-8")) for file in TEST_FILES}
    assert {importer: imported for importer, imported in found.items() if imported} == {}


def test_the_checks_of_tests_work() -> None:
    assert (about("kernels.test_cpu"), about("test_recipe")) == ("kernels.cpu", "recipe")
    assert imported_tests("from kernels.test_cpu import a") and imported_tests("def f():\n    import test_cli")
    assert imported_tests("from kernels import test_cpu") == {"kernels.test_cpu"}
    assert not imported_tests("from small_models import save\nimport pytest")


def test_no_circles() -> None:
    assert circle(module_texts()) == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("from afpq.low.a import f", []),
        ("from afpq.middle.b import f", []),
        ("import afpq.high", ["middle.a imports high"]),
        ("from afpq.high import f", ["middle.a imports high"]),
        ("from afpq import high", ["middle.a imports high"]),
        ("from afpq import f", ["middle.a imports __init__"]),
        ("import afpq", ["middle.a imports __init__"]),
        ("def g():\n    from afpq.high import f", ["middle.a imports high"]),
        ("from afpq.unlisted import f", ["middle.a imports unlisted"]),
        ("import torch\nfrom os import path", []),
    ],
)
def test_the_check_of_rooms_works(text: str, caught: list[str]) -> None:
    others = dict.fromkeys(("low.a", "middle.b", "high", "__init__"), "")
    assert upward_imports({"middle.a": text, **others}, ["low", "middle", "high", "__init__"]) == caught


def test_the_check_of_circles_works() -> None:
    straight = {"room.a": "", "room.b": "from afpq.room.a import f", "room": "from afpq.room.b import g"}
    assert circle(straight) == []
    assert set(circle({**straight, "room.a": "def g():\n    from afpq.room import b"})) == {"room.a", "room.b"}


def test_every_module_has_a_name_of_its_own() -> None:
    """`rows` says where to look; two of them would not."""
    names = [module.rpartition(".")[2] for module in MODULES if module not in ROOMS]
    assert sorted(names) == sorted(set(names))


def test_the_picture_shows_the_code_as_it_is() -> None:
    assert PICTURE.read_text("utf-8") == rooms_svg(), "run python docs/rooms.py"


def test_a_room_says_in_one_sentence_what_it_is() -> None:
    for file in SOURCE.glob("*/__init__.py"):
        first = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").splitlines()[0]
        assert first.endswith(".") and len(first) <= 120, file


def long_functions(text: str) -> list[str]:
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [n.name for n in functions if (n.end_lineno or 0) - n.lineno >= MAX_FUNCTION_LINES]


def test_long_files_are_few() -> None:
    longer = {module_of(file) for file in FILES if len(file.read_text("utf-8").splitlines()) > MAX_LINES}
    assert longer == LONGER.keys() and len(LONGER) <= 5
    assert long_functions("def f():\n" + "    x = 1\n" * 60) == ["f"]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_file_keeps_the_rules(file: Path) -> None:
    text = file.read_text("utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert len(text.splitlines()) <= MAX_LINES or module_of(file) in LONGER
    assert not long_functions(text)
    allowed = BEHIND.get(module_of(file), set())
    assert not imported_packages(outside_functions(ast.parse(text))) & OPTIONAL - allowed
    assert not imported_packages(ast.walk(ast.parse(text))) & FORBIDDEN.get(room_of(module_of(file)), set())
    assert not loads_pickles(text)
    assert not runs_what_it_reads(text)
    assert ast.get_docstring(ast.parse(text))


def test_modules_behind_an_optional_package_are_imported_in_functions_only() -> None:
    for file in FILES:
        top = ast.Module(
            [n for n in outside_functions(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.stmt)], []
        )
        assert not BEHIND.keys() & set(afpq_imports(ast.unparse(top), MODULES)), file


def test_no_public_name_is_also_a_module() -> None:
    """Importing the module would put it in the name's place, and the documentation would show it twice."""
    import afpq

    assert not set(afpq.__all__) & {path.stem for path in SOURCE.iterdir()}


def test_the_checks_of_rules_work() -> None:
    def packages(text: str) -> set[str]:
        return imported_packages(outside_functions(ast.parse(text)))

    assert packages("try:\n    import triton.language\nexcept ImportError:\n    pass") == {"triton"}
    assert packages("class A:\n    from peft import B") == {"peft"}
    assert packages("def f():\n    import matplotlib") == set()
    assert loads_pickles("import torch\nx = torch.load('a')")
    assert loads_pickles("from torch import load")
    assert loads_pickles("def f():\n    import pickle")
    assert not loads_pickles("import torch, json\njson.load(f)")
    for text in (
        "eval('1')",
        "def f():\n    exec(x)",
        "import yaml",
        "from joblib import load",
        "g(allow_pickle=True)",
    ):
        assert runs_what_it_reads(text)
    assert not runs_what_it_reads("model.eval()\nre.compile('a')\nimport json")
