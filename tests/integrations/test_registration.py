# SPDX-License-Identifier: MIT
"""The plug-in is registered before anyone can ask Transformers for it, in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys

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
        "import afpq, transformers; transformers.LlamaForCausalLM",
    ],
)
def test_it_is_registered(lines: str) -> None:
    code = f"{lines}\nimport sys, transformers\nassert 'transformers.quantizers.auto' in sys.modules\n{KNOWN}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
