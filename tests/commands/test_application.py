# SPDX-License-Identifier: MIT
"""The application as a whole: its help and its version need neither torch nor Transformers, nor anything optional."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture

from afpq.version import __version__

HEAVY = ("torch", "transformers", "numpy", "datasets", "huggingface_hub", "safetensors", "jinja2", "afpq.kernels")
CALL = f"""
import sys
from pathlib import Path
from afpq.cli import main
try:
    main()
finally:
    print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
"""


@pytest.mark.parametrize("words", ["--help", "--version", "quantize --help", "compare --help", "generate --help"])
def test_help_and_version_import_nothing_heavy(words: str) -> None:
    done = subprocess.run([sys.executable, "-c", CALL, *words.split()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("loaded:\n"), done.stdout[-200:]
    assert done.stdout.startswith(f"afpq {__version__}\n") if words == "--version" else "Usage:" in done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, afpq; afpq.parse_scheme('nf4-asym-g64-log8'); sys.exit(any(n in sys.modules for n in {HEAVY}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_mistake_in_a_scheme_is_found_without_torch() -> None:
    words = ["quantize", "a", "b", "--format", "nf9"]
    done = subprocess.run([sys.executable, "-c", CALL, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "nf9" in done.stderr and done.stdout == "loaded:\n"


def test_the_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"afpq {__version__}\n", "")


@pytest.mark.parametrize("words", [["--verbose", "--quiet", "info", "a"], ["info", "a", "--quiet", "--verbose"]])
def test_verbose_and_quiet_exclude_each_other(cli: Cli, words: list[str]) -> None:
    assert_refused(cli(*words), "--verbose", "--quiet")


STOP = """
import os, signal, sys
_, module, model = sys.argv
signal.signal(signal.SIGINT, signal.default_int_handler)
class Stop:
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
from afpq.cli import main
sys.meta_path.insert(0, Stop())
sys.argv = ["afpq", "info", model]
main()
"""


@pytest.mark.parametrize(
    "module", ["typer", "rich.console", "afpq.commands.quantize", "torch", "numpy", "transformers"]
)
def test_a_stop_while_something_is_imported_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", STOP, module, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, ""), done
    assert re.fullmatch(r"afpq: stopped[^\n]*\n", done.stderr), done.stderr
