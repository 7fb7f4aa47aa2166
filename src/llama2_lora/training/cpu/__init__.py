"""Training without CUDA: what PLATFORM=cpu adds, so that the GPU recipe runs on two CPU cores over gloo.

`platform` makes torch answer for one CUDA device that is the CPU; `layers` gives Megatron's plain layers sequence and
context parallelism. Nothing here is imported on a GPU.
"""

from __future__ import annotations

from llama2_lora.training.cpu.device import cpu_platform
from llama2_lora.training.cpu.layers import CPU_MODEL_OPTIONS, cpu_layer_spec

__all__ = ["CPU_MODEL_OPTIONS", "cpu_layer_spec", "cpu_platform"]
