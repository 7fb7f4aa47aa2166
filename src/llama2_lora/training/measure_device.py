"""The GPU to measure on, or why there is none. Imports torch and nothing heavier: the answer should come at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama2_lora.config.settings import Settings
from llama2_lora.gpus import named_in


@dataclass(frozen=True)
class Device:
    """What is measured on."""

    name: str
    accelerator: str  # key of ACCELERATORS, or empty
    capacity: int  # bytes
    cuda: str


def device_of(settings: Settings) -> Device:
    """The one GPU that is visible, or the CPU. ValueError, in one line, where there is none that torch can use."""
    if settings.system.platform == "cpu":
        return Device("CPU", "", 0, "")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(_why_no_gpu(str(error))) from None
    properties = torch.cuda.get_device_properties(0)
    part = named_in(properties.name)
    return Device(properties.name, part.name if part else "", properties.total_memory, str(torch.version.cuda))


def _why_no_gpu(reason: str) -> str:
    """torch's own reasons (torch/csrc/cuda, torch/cuda/__init__.py; 2.9 to 2.13), each with what to do about it."""
    if "not compiled with CUDA" in reason:
        return f"torch {torch.__version__} has no CUDA: measure in the image, or with PLATFORM=cpu (config_CPU_1x2x4.sh)"
    if "driver on your system is too old" in reason:
        return f"the NVIDIA driver is too old for this torch's CUDA {torch.version.cuda}: update it, or take an older image"
    if "no NVIDIA driver" in reason:
        return "no NVIDIA driver: run on a node with a GPU, in a container that was given it (docker run --gpus all)"
    return f"no GPU: {reason.splitlines()[0]}; is it given to this container, and CUDA_VISIBLE_DEVICES right?"
