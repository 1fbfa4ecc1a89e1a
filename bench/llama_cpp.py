# SPDX-License-Identifier: MIT
"""The accuracy of llama.cpp's block types by our protocol (bench/protocol.py), with an importance matrix.

    git clone https://github.com/ggml-org/ggml
    cmake -S ggml -B ggml/build -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release
    cmake --build ggml/build --target ggml-base
    python bench/llama_cpp.py ../shared/models/lm6m --text ../shared/text/wikitext2-test.txt \
        --calibration-text ../shared/text/calibration.txt --out peers.jsonl --library ggml/build/src/libggml-base.so

Weights go through `ggml_quantize_chunk` and back through the type's `to_float`. Every linear gets the same type, where
the files of llama.cpp give a few tensors more bits. The importance matrix is the mean square of each linear's inputs
in the float model over the calibration windows (`--plain` goes without). True bits are those of the blocks, which
hold all their scales.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from protocol import Protocol, linears, parser, protocol_of, second_moments
from torch import Tensor, nn

from afpq.evaluation.loading import load_model

TYPES = {
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip


class Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


class Ggml:
    """The library's types."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.ggml_quantize_chunk.restype = c_size_t
        self._library.ggml_quantize_chunk.argtypes = (c_int, c_void_p, c_void_p, *[c_int64] * 3, POINTER(c_float))
        self._library.ggml_get_type_traits.restype = POINTER(Traits)

    def traits(self, name: str) -> Traits:
        """Raises AssertionError where the library's numbering is another."""
        traits: Traits = self._library.ggml_get_type_traits(TYPES[name]).contents
        assert traits.type_name.decode().lower() == name.lower(), f"type {TYPES[name]} is {traits.type_name!r}"
        return traits

    def bits(self, name: str) -> float:
        traits = self.traits(name)
        return 8 * traits.type_size / traits.blck_size

    def round_trip(self, name: str, weight: Tensor, importance: Tensor | None) -> Tensor:
        """[out, in] float32 -> what its blocks hold; `importance` [in] float32."""
        traits, (rows, columns) = self.traits(name), weight.shape
        assert columns % traits.blck_size == 0, f"rows of {columns}, blocks of {traits.blck_size}"
        weight, back = weight.detach().contiguous(), torch.empty(rows, columns)
        blocks = ctypes.create_string_buffer(weight.numel() // traits.blck_size * traits.type_size)
        weights = None if importance is None else ctypes.cast(importance.data_ptr(), POINTER(c_float))
        source = weight.data_ptr()
        self._library.ggml_quantize_chunk(TYPES[name], source, blocks, 0, rows, columns, weights)
        traits.to_float(ctypes.addressof(blocks), back.data_ptr(), weight.numel())
        return back


def run(protocol: Protocol, model: nn.Module, ggml: Ggml, name: str, importance: dict[str, Tensor]) -> None:
    """Put the weights of a float32 model through the type in place, and measure it; no `importance` is --plain."""
    start = time.process_time()
    for layer, linear in linears(model).items():
        linear.weight.data = ggml.round_trip(name, linear.weight, importance.get(layer))
    seconds = time.process_time() - start
    protocol.add(model, name, method_of(importance), ggml.bits(name), seconds, tool="llama.cpp")


def method_of(importance: dict[str, Tensor]) -> str:
    return "imatrix" if importance else "no data"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--library", type=Path, required=True, help="libggml-base.so")
    options.add_argument("--types", default=",".join(TYPES))
    options.add_argument("--plain", action="store_true", help="without importance matrix; IQ2 types cannot")
    arguments: argparse.Namespace = options.parse_args()
    ggml, protocol = Ggml(arguments.library), protocol_of(arguments)
    importance: dict[str, Tensor] = {}
    if not arguments.plain:
        importance = second_moments(load_model(arguments.model).to(torch.float32), protocol.calibration)
    for name in arguments.types.split(","):
        if (name, method_of(importance)) not in protocol.done:
            run(protocol, load_model(arguments.model).to(torch.float32), ggml, name, importance)


if __name__ == "__main__":
    main()
