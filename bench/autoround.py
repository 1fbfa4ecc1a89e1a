# SPDX-License-Identifier: MIT
"""AutoRound's accuracy by our protocol (bench/protocol.py), on the CPU: by default its own 200 iterations of 8 windows.

    pip install auto-round==0.16.1
    python bench/autoround.py ../shared/models/lm6m --text ../shared/text/wikitext2-test.txt \
        --calibration-text ../shared/text/calibration.txt --out peers.jsonl

True bits: codes, a float16 scale a group, and for asym a zero point of as many bits as a code.
"""

from __future__ import annotations

import argparse
import re
import time
from importlib.metadata import version

import torch
from protocol import Protocol, assert_quantized, parser, protocol_of

from afpq.evaluation.loading import load_model, load_tokenizer

SCHEMES = "int3-sym-g128,int3-asym-g128,int4-sym-g128,int2-asym-g64,int2-sym-g128"
NAME = re.compile(r"int(?P<bits>\d)-(?P<sym>sym|asym)-g(?P<group>\d+)")


def true_bits(bits: int, sym: bool, group: int) -> float:
    return bits + (16 if sym else 16 + bits) / group


def run(protocol: Protocol, arguments: argparse.Namespace, scheme: str, method: str) -> None:
    """Quantize a float32 copy of the model in place and measure it."""
    from auto_round import AutoRound

    name = NAME.fullmatch(scheme)
    assert name, f"{scheme}: use int3-sym-g128 or the like"
    bits, sym, group = int(name["bits"]), name["sym"] == "sym", int(name["group"])
    model = load_model(arguments.model).to(torch.float32)
    start = time.process_time()
    quantizer = AutoRound(
        model,
        load_tokenizer(arguments.model),
        scheme={"bits": bits, "sym": sym, "group_size": group, "data_type": "int", "act_bits": 16},
        dataset=list(protocol.calibration.split(1)),
        iters=arguments.iters,
        nsamples=len(protocol.calibration),
        seqlen=protocol.calibration.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = quantizer.quantize()
    seconds = time.process_time() - start
    assert_quantized(quantized, group, 2**bits)
    notes = {"tool": "AutoRound", "version": version("auto-round"), "torch": torch.__version__}
    protocol.add(quantized, scheme, method, true_bits(bits, sym, group), seconds, **notes, iters=arguments.iters)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--schemes", default=SCHEMES)
    options.add_argument("--iters", type=int, default=200)
    arguments = options.parse_args()
    protocol, method = protocol_of(arguments), f"{arguments.iters} iterations"
    for scheme in arguments.schemes.split(","):
        if (scheme, method) not in protocol.done:
            run(protocol, arguments, scheme, method)


if __name__ == "__main__":
    main()
