# SPDX-License-Identifier: MIT
"""The shape of the code: a file imports only files above it, optional packages stay optional, files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "afpq"

# Every module of the package, in reading order: each imports only modules further up.
ORDER = [
    "errors", "devices", "version", "formats", "scheme", "scales", "groups", "search",
    "algorithms.books", "algorithms.rtn", "algorithms.awq", "algorithms.descent", "algorithms.gptq",
    "algorithms.two_sided", "algorithms.correction", "algorithms.knapsack", "algorithms",
    "packing", "kernels.packed", "kernels.reference", "kernels.cpu", "kernels.tiles", "kernels.triton", "kernels.gpu",
    "kernels", "linear", "coverage", "blocks", "ends", "embedding", "source", "experts", "names", "unfuse", "folds",
    "calibrate", "routing", "cards", "config", "data", "skeleton", "plan", "decide", "pipeline", "transforms", "solve",
    "head", "gradients", "taps", "fisher", "calibrated", "sensitivity", "convert", "swap", "unpack_model",
    "checkpoint", "budget", "lock", "workdir", "integrations", "integrations.hub", "integrations.transformers",
    "memory", "loading", "selftest", "stored", "integrations.peft", "integrations.lm_eval",
    "evaluate", "measure", "report", "card", "job", "end_pass", "carry_out", "api", "info", "inspect_model", "estimate",
    "demo",
    "provenance", "rewrite", "export_model", "bnb", "import_checkpoint",
    "__init__", "console",
    "comparison", "comparison.speed", "comparison.distributions", "comparison.peers", "comparison.cells",
    "comparison.agenda", "comparison.findings", "comparison.tabulate", "comparison.compare",
    "comparison.svg", "comparison.figures", "comparison.page", "comparison.report",
    "commands", "commands.common", "commands.quantize", "commands.inspect", "commands.evaluate", "commands.compare",
    "commands.exchange", "cli", "__main__",
]  # fmt: skip

OPTIONAL = {
    "matplotlib", "datasets", "peft", "vllm", "triton", "lm_eval", "bitsandbytes", "hqq", "torchao", "accelerate",
}  # fmt: skip
BEHIND = {
    "kernels.triton": {"triton"},
    "integrations.peft": {"peft"},
}  # modules that need an optional package, and are imported in functions only
MAX_LINES = 350

FILES = sorted(SOURCE.rglob("*.py"))


def module_of(file: Path, root: Path = SOURCE) -> str:
    """`algorithms/rtn.py` -> algorithms.rtn, `kernels/__init__.py` -> kernels, `__init__.py` -> __init__."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def afpq_imports(text: str, modules: list[str]) -> Iterator[str]:
    """Every module of `modules` that a file with this text imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from a import b` means the module a.b where there is one, else a name in the module a
            longer = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("afpq.") in modules else str(node.module) for n in longer]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "afpq":
                yield name.removeprefix("afpq.") if name != "afpq" else "__init__"


def upward_imports(texts: dict[str, str], order: list[str]) -> list[str]:
    """One line for every import of a module that does not come earlier in `order`; `texts` are by module."""
    return [
        f"{module} imports {imported}"
        for module, text in texts.items()
        if module in order
        for imported in afpq_imports(text, order)
        if imported not in order[: order.index(module)]
    ]


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


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(module_of(file) for file in FILES)


def test_imports_go_up_only() -> None:
    assert upward_imports({module_of(file): file.read_text("utf-8") for file in FILES}, ORDER) == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("from afpq.low import f", []),
        ("import afpq.high", ["middle imports high"]),
        ("from afpq.high import f", ["middle imports high"]),
        ("from afpq import high", ["middle imports high"]),
        ("from afpq import f", ["middle imports __init__"]),
        ("import afpq", ["middle imports __init__"]),
        ("def g():\n    from afpq.high import f", ["middle imports high"]),
        ("from afpq.pack import inner", ["middle imports pack.inner"]),
        ("from afpq.unlisted import f", ["middle imports unlisted"]),
        ("from afpq.middle import f", ["middle imports middle"]),
        ("import torch\nfrom os import path", []),
    ],
)
def test_the_check_of_imports_works(text: str, caught: list[str]) -> None:
    assert upward_imports({"middle": text}, ["low", "middle", "high", "pack.inner", "__init__"]) == caught


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_file_keeps_the_rules(file: Path) -> None:
    text = file.read_text("utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert len(text.splitlines()) <= MAX_LINES
    allowed = BEHIND.get(module_of(file), set())
    assert not imported_packages(outside_functions(ast.parse(text))) & OPTIONAL - allowed
    assert not loads_pickles(text)
    assert not runs_what_it_reads(text)
    assert ast.get_docstring(ast.parse(text))


def test_modules_behind_an_optional_package_are_imported_in_functions_only() -> None:
    for file in FILES:
        top = ast.Module(
            [n for n in outside_functions(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.stmt)], []
        )
        assert not BEHIND.keys() & set(afpq_imports(ast.unparse(top), ORDER)), file


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
