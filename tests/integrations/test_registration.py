# SPDX-License-Identifier: MIT
"""The plug-in is registered before anyone can ask Transformers for it, in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = "assert 'afpq' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING, 'not registered'"


@pytest.mark.parametrize(
    "lines",
    [
        "import afpq; import transformers.quantizers.auto",
        "import afpq; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING",
        "import afpq; import transformers.quantizers; import transformers.quantizers.auto",
        "import afpq.integrations.transformers; import transformers.quantizers.auto",
        "import afpq; from transformers import AutoModelForCausalLM; import transformers.modeling_utils",
        "import afpq; from transformers import PreTrainedModel",
        "import transformers.quantizers.auto; import afpq",
        "from transformers import LlamaForCausalLM; import afpq; import transformers.quantizers.auto",
        "import afpq; afpq.AfpqConfig",
        "import afpq.model.quantize_in_memory; import transformers.quantizers.auto",
        "import afpq.checkpoint.locate; import transformers.quantizers.auto",
        "import afpq, transformers; transformers.LlamaForCausalLM",
    ],
)
def test_it_is_registered(lines: str) -> None:
    code = f"{lines}\nimport sys, transformers\nassert 'transformers.quantizers.auto' in sys.modules\n{KNOWN}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EACH_FIRST = """
import os, sys, torch, transformers, huggingface_hub, safetensors.torch
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


@pytest.mark.slow
def test_every_module_can_be_the_first_that_is_imported() -> None:
    import afpq

    source = Path(afpq.__file__).parent
    parts = (path.relative_to(source).with_suffix("").parts for path in sorted(source.rglob("*.py")))
    optional = {"afpq.__main__", "afpq.kernels.triton_kernels"}  # the one runs, the other needs Triton
    names = [".".join(("afpq", *part)).removesuffix(".__init__") for part in parts]
    done = subprocess.run(
        [sys.executable, "-c", EACH_FIRST, *(name for name in names if name not in optional)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
