"""A pretended H100 for building, not running: nothing but shapes, names and configs comes out of it.

The CPU platform pretends a device that computes on the CPU without Transformer Engine; this one says "Hopper" to
Transformer Engine's and Megatron's questions, so that the GPU recipe can be built on the meta device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100")


@contextmanager
def fake_h100() -> Iterator[None]:
    from llama2_lora.training.cpu.device import _CudaIsCpu

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: H100,
        "get_device_name": lambda device=None: "H100",
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "stream": lambda stream: nullcontext(),
        "Stream": SimpleNamespace,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "default_generators": (torch.default_generator,),
        "_lazy_init": lambda: None,
        "_initialized": True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.cuda.random, "current_device", lambda: 0))
        stack.enter_context(_CudaIsCpu())
        yield


def cuda_home() -> dict[str, str]:
    """Transformer Engine looks for the CUDA libraries; where pip installed them, it must be told."""
    if "CUDA_HOME" in os.environ:
        return {"CUDA_HOME": os.environ["CUDA_HOME"]}
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path, "cu13") for path in (spec.submodule_search_locations or [])] if spec else []
    return {"CUDA_HOME": str(next(filter(Path.is_dir, folders)))} if folders else {}
