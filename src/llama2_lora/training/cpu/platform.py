"""PLATFORM=cpu: the GPU recipe on two CPU cores, over gloo.

Megatron, NeMo and Transformer Engine run as they are. `cpu_platform` makes torch answer for one CUDA device that is the CPU
(device.py), and gives Transformer Engine its kernels in plain torch (extension.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch

from llama2_lora.training.cpu import device, extension

# What the stand-ins were written against and are tested with.
TESTED_VERSIONS = {"nemo_toolkit": "2.7.", "megatron-core": "0.15.", "transformer_engine": "2.9."}


@contextmanager
def cpu_platform(capability: tuple[int, int] = device.HOPPER) -> Iterator[None]:
    """Let NeMo and Megatron build, train, evaluate, save and load without CUDA. Enter before Megatron is imported.

    The pretence holds for the thread that enters (torch function modes are per thread) and ends with the context, whatever
    happens inside: torch, NeMo and Transformer Engine are then as before. Transformer Engine stays imported.

    capability: CUDA's compute capability of the pretended device; Transformer Engine chooses kernels and layouts by it.

    Raises:
        ValueError: a CUDA device can be seen, so a run meant for the CPU could mix the two.
        RuntimeError: an installed library is not of a version that this was tested with, or was imported too early.
        AttributeError: a replaced name no longer exists.
    """
    if torch.cuda.is_available():
        raise ValueError("PLATFORM=cpu: a CUDA device is visible; set CUDA_VISIBLE_DEVICES= or use PLATFORM=gpu")
    with ExitStack() as stack:
        for owner, name, stand_in in device.stand_ins(capability):
            stack.enter_context(_replaced(owner, name, stand_in))
        stack.enter_context(device.CudaIsCpu())
        extension.load()
        _check_versions()
        for owner, name, stand_in in extension.stand_ins():
            stack.enter_context(_replaced(owner, name, stand_in))
        stack.enter_context(extension.forgotten_answers())
        yield


def _check_versions() -> None:
    for package, prefix in TESTED_VERSIONS.items():
        if not version(package).startswith(prefix):
            raise RuntimeError(f"PLATFORM=cpu: {package} is {version(package)}; cpu_platform was tested with {prefix}x")


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)  # AttributeError when a library has dropped the name
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
