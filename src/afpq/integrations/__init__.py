# SPDX-License-Identifier: MIT
"""Adapt other libraries (Transformers, the Hugging Face hub, PEFT) to quantized models."""
