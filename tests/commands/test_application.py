# SPDX-License-Identifier: MIT
"""The application as a whole: its help and its version need neither torch nor Transformers, nor anything optional."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture

from afpq.version import __version__

HEAVY = ("torch", "transformers", "numpy", "datasets", "huggingface_hub", "safetensors", "jinja2", "afpq.kernels")
CALL = f"""
import sys
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
