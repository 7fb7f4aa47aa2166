"""Transformer Engine with its CPU kernels, before a test file of this room imports Megatron without it."""

from __future__ import annotations

from llama2_lora.training.cpu import extension

extension.load()
