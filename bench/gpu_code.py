# SPDX-License-Identifier: MIT
"""What the GPU kernels compile to, without a GPU: instructions for each weight, registers, shared memory, spills.

    python bench/gpu_code.py [--quick] [--arch 80 86 90] [--bits 4 3 2] [--out gpu_code.json]

Triton compiles every tile of `afpq.kernels.gpu_tiles` for each architecture, and its disassembler shows the main loop.
Up to 16 tokens a GPU should wait for memory alone, so instructions are counted for each weight there: an H200 can
issue 3.7 in the time in which it reads a 4-bit weight, an A100 5.9, an RTX 4090 24.

Exits with 1 where code is beyond its budget, spills registers, or needs more shared memory than a program can have.
Counts are those of the Triton that is installed; another version may differ by some percent.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from afpq.kernels import triton_kernels as kernels
from afpq.kernels.gpu import PANEL
from afpq.kernels.gpu_tiles import Tile, tile_for

KINDS = ("sym", "asym", "zero", "bytes")  # one scale, two, one and a zero point, two of a byte
SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB a program may have
# (architecture, bits, kind) -> instructions for each weight, up to 16 tokens, groups of 128. At 4 bits on Hopper what
# the best prototype of this loop took, on Ampere what an A100's memory leaves time for, else 3 % above the first count.
BUDGET = {
    (90, 4, "sym"): 3.57, (90, 4, "asym"): 4.27, (90, 4, "zero"): 4.8,
    (90, 3, "sym"): 4.15, (90, 3, "asym"): 4.95, (90, 3, "zero"): 5.6,
    (90, 2, "sym"): 3.9, (90, 2, "asym"): 4.75, (90, 2, "zero"): 5.1,
    (80, 4, "sym"): 5.9, (80, 4, "asym"): 5.9, (80, 4, "zero"): 5.9,
}  # fmt: skip
FEW_SPILLS = 4  # loads and stores in a loop of hundreds of instructions; the assembler's choice, and no cost
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Code:
    """One compiled kernel."""

    arch: int
    bits: int
    kind: str
    tokens: int  # 0: decoding panels
    dtype: str
    tile: Tile
    instructions: int
    each: float  # instructions for each weight, in the main loop
    registers: int
    spilled: int  # loads and stores of spilled registers in the main loop
    shared: int  # bytes
    most: dict[str, int]

    def faults(self) -> list[str]:
        budget = BUDGET.get((self.arch, self.bits, self.kind))
        found = []
        if budget is not None and 0 < self.tokens <= 16 and self.each > budget:
            found.append(f"{self.each:.2f} instructions for each weight, budget {budget}")
        if self.spilled > FEW_SPILLS:
            found.append(f"registers spilled: {self.spilled} loads and stores")
        if self.shared > SHARED[self.arch] * 1024:
            found.append(f"{self.shared / 1024:.0f} KiB of shared memory, {SHARED[self.arch]} at most")
        return found


POINTERS = {"q": "u8", "scales": "fp16", "scales_neg": "fp16", "zeros": "u8", "book": "fp32", "pairs": "i32"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compiled(
    kernel: Any, arch: int, kind: str, pointers: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    """A kernel for shapes that are multiples of the tile, as real models have them, and rows of one kind of scheme."""
    pointers = POINTERS | pointers
    constants = {"GROUP": 128, "ALIGNED": True, "EVEN": True, "PORTABLE": False} | constants
    if kind == "bytes":
        pointers |= {"scales": "u8", "scales_neg": "u8", "grid": "fp32"}
    else:
        constants["grid"] = None
    if kind not in ("asym", "bytes"):
        constants["scales_neg"] = None
    if kind != "zero":
        constants["zeros"] = None
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
        for name in names
    }
    # What Triton finds out at a call: addresses and sizes divisible by 16.
    divisible = [i for i, name in enumerate(names) if name in pointers or name in ("N", "K", "row_bytes")]
    source = ASTSource(
        fn=kernel, signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible if names[i] not in constants},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compiled_linear(arch: int, bits: int, kind: str, tile: Tile, dtype: str, **changes: Any) -> Any:
    constants = {
        "BITS": bits, "FOLD": tile.fold, "SPLIT": True, "BN": tile.rows, "BM": tile.tokens, "BK": tile.columns,
        "STAGES": tile.stages, "T": kernels.product_dtype(DTYPES[dtype]), "bias": None,
    } | changes  # fmt: skip
    pointers = {"x": dtype, "y": dtype, "sums": "fp32", "arrived": "i32"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compiled(kernels.linear, arch, kind, pointers, constants, **options)


def compiled_dequantize(arch: int, bits: int, kind: str, tile: Tile, dtype: str, **changes: Any) -> Any:
    constants = {"BITS": bits, "BN": tile.rows, "BK": tile.columns} | changes
    return compiled(kernels.dequantize, arch, kind, {"w_hat": dtype, "pairs": "fp32"}, constants, num_warps=tile.warps)


# Paths that the table does not take: what runs in the interpreter need not compile.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"ALIGNED": False, "EVEN": False}, {"EVEN": False}, {"GROUP": 0}, {"PORTABLE": True},
)  # fmt: skip


def compile_variants(arch: int, dtype: str) -> int:
    """Compile them all, without looking at the code; how many there were."""
    count = 0
    for kind in KINDS:
        tile = tile_for((arch // 10, arch % 10), 16)
        for changes in (*VARIANTS, {"SPLIT": False, "sums": None, "arrived": None}):
            compiled_linear(arch, 3, kind, tile.within(changes.get("GROUP", 128)), dtype, **changes)
            count += 1
        for changes in (*VARIANTS, {"GROUP": 48}):
            compiled_dequantize(arch, 3, kind, PANEL, "fp32", **changes)
            count += 1
    return count


def disassembled(cubin: bytes) -> tuple[list[tuple[int, str]], str]:
    """(addresses and instructions, what the disassembler says of resources)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        said = [
            subprocess.run([TOOLS / "cuobjdump", what, file], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-sass", "--dump-resource-usage")
        ]
    lines = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^/]*?);", said[0])
    return [(int(line[1], 16), line[2].strip()) for line in lines], said[1]


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions of the longest loop: from the target of a backward branch to the branch."""
    best = (0, -1)
    for address, text in code:
        branch = re.search(r"BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if branch and (start := int(branch[1], 16)) < address and address - start > best[1] - best[0]:
            best = (start, address)
    return [text for address, text in code if best[0] <= address <= best[1]]


def examine(arch: int, bits: int, kind: str, tokens: int, dtype: str) -> Code:
    """The code for so many tokens; 0: of decoding panels, which has no loop."""
    if tokens:
        tile = tile_for((arch // 10, arch % 10), tokens).within(128)
        kernel = compiled_linear(arch, bits, kind, tile, dtype)
    else:
        tile = PANEL
        kernel = compiled_dequantize(arch, bits, kind, tile, dtype)
    code, said = disassembled(kernel.asm["cubin"])
    body = main_loop(code) if tokens else [text for _, text in code if not text.startswith("NOP")]
    used = re.search(r"REG:(\d+)", said)
    if used is None or not body:
        sys.exit(f"cannot read the disassembly of {kind} {bits} bits, sm_{arch}: {said.strip()[-300:]}")
    operations = [text.split()[1] if text.startswith("@") else text.split()[0] for text in body]
    counts = collections.Counter(operation.split(".")[0] for operation in operations)
    return Code(
        arch, bits, kind, tokens, dtype, tile, len(body), len(body) * tile.warps * 32 / (tile.rows * tile.columns),
        int(used[1]), counts["LDL"] + counts["STL"], kernel.metadata.shared, dict(counts.most_common(6)),
    )  # fmt: skip


def row(code: Code) -> str:
    tile = code.tile
    cells = [
        f"sm_{code.arch}", f"{code.bits} bits {code.kind}", code.dtype, f"{code.tokens}" if code.tokens else "decoding",
        f"{tile.rows} x {tile.tokens} x {tile.columns}", f"{code.each:.2f}", f"{code.registers}",
        f"{code.shared / 1024:.0f} KiB", ", ".join(f"{name} {count}" for name, count in code.most.items()),
        "; ".join(code.faults()) or "ok",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED), default=[80, 86, 90])
    parser.add_argument("--bits", type=int, nargs="+", choices=[2, 3, 4], default=[4, 3, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 256, 0], help="0: decoding panels")
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--quick", action="store_true", help="up to 16 tokens only")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if kernels.PORTABLE:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    print("| GPU | weight | x | tokens | tile | instr / weight | registers | shared | most | |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    codes = []
    for arch in arguments.arch:
        for tokens in [16] if arguments.quick else arguments.tokens:
            for bits in arguments.bits:
                for kind in KINDS:
                    codes.append(examine(arch, bits, kind, tokens, arguments.dtype))
                    print(row(codes[-1]), flush=True)
    print(f"\nother paths compiled: {compile_variants(90, arguments.dtype)}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([vars(code) | {"tile": vars(code.tile)} for code in codes], indent=1))
    sys.exit(any(code.faults() for code in codes))


if __name__ == "__main__":
    main()
