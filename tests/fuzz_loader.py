# SPDX-License-Identifier: MIT
"""Damaged checkpoints, chosen by what they reach in the package's code (Atheris, libFuzzer's engine).

    python tests/fuzz_loader.py quantized|float -runs=5000 [more options of libFuzzer]

Prints how many inputs ended how. An input that ends otherwise stops it: libFuzzer writes its bytes to `crash-...`, and
the same command with that file's name instead of -runs repeats it. Without Atheris (`pip install 'afpq[fuzz]'`, Linux),
`-runs=N -seed=S` throws plain dice.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
ATHERIS: Any = None
if importlib.util.find_spec("atheris"):
    import atheris

    ATHERIS = atheris
    with atheris.instrument_imports(include=["afpq"], enable_loader_override=False):
        import fuzzing
else:
    import fuzzing

ends: Counter[str] = Counter()
messages: Counter[str] = Counter()


def judge(kind: str, place: Path, dice: fuzzing.Dice) -> None:
    """One input: damage, and what comes of it."""
    floating, quantized = _SEEDS[kind]
    files = fuzzing.damage(floating if kind == "float" else fuzzing.pick(dice, quantized), dice)
    fuzzing.write(files, place / "model")
    if kind == "float":
        end, said = fuzzing.judge_float(place / "model", place / "out")
    else:
        end, said = fuzzing.judge_quantized(place / "model", direct=dice(4) == 0)
    ends[end] += 1
    messages[re.sub(r"/\S+|\d+|'[^']*'", "_", said)[:60]] += 1
    if ends.total() == _RUNS:  # libFuzzer ends the process without a word to Python
        report()
        shutil.rmtree(place)


_RUNS = next((int(option.removeprefix("-runs=")) for option in sys.argv if option.startswith("-runs=")), 1000)
_SEEDS: dict[str, tuple[fuzzing.Files, list[fuzzing.Files]]] = {}


def report() -> None:
    """How all inputs so far ended."""
    print(f"{ends.total()} inputs:", ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    most = "".join(f"\n  {count:5} {text}" for text, count in messages.most_common(12))
    print(f"{len(messages)} different messages, as{most}", flush=True)


def main(kind: str, options: list[str]) -> None:
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    _SEEDS[kind] = fuzzing.make_seeds(place)
    if ATHERIS is not None:

        def one(data: bytes) -> None:
            source = ATHERIS.FuzzedDataProvider(data)
            judge(kind, place, lambda n: int(source.ConsumeIntInRange(0, n - 1)))

        if all(option.startswith("-") for option in options):
            corpus = place / "corpus"  # libFuzzer would begin with no bytes at all, which throw nothing but zeros
            corpus.mkdir()
            for index in range(64):
                (corpus / str(index)).write_bytes(random.Random(index).randbytes(128))
            options = [*options, str(corpus)]
        # Torch maps more memory than libFuzzer finds proper; an input that hangs ends it after a minute.
        limits = ("-rss_limit_mb=0", "-timeout=60", "-max_len=256", "-len_control=0")
        ATHERIS.Setup([sys.argv[0], *limits, *options], one)
        ATHERIS.Fuzz()
        return
    given = dict(option.lstrip("-").split("=") for option in options)
    for index in range(_RUNS):
        judge(kind, place, random.Random(int(given.get("seed", 0)) * 10**9 + index).randrange)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
