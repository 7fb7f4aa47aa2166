"""Transformer Engine with its CPU kernels, before a test file of this room imports Megatron without it."""

from __future__ import annotations

import torch

from llama2_lora.training.cpu import extension

if not torch.cuda.is_available():  # else the real one is there, and the files of this room are collected only
    extension.load()
