"""One pretended CUDA device, which is the CPU.

Megatron Core and NeMo train on any device, but they spell it "cuda". Rather than replace their functions one by one,
`cpu_platform` answers for the device at the one place that they all ask: torch. Three layers, from wide to narrow:

1. `_CudaIsCpu` sees every torch call and turns requests for a CUDA device or pinned memory into plain CPU ones.
2. `_stand_ins` lists the names of `torch.cuda` that Megatron calls, and what they answer here.
3. One NeMo name is wrong without Transformer Engine, on any device.

The random generator of the pretended device *is* the CPU generator, so Megatron's RNG tracker, seeding and dropout work
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What the stand-ins below were written against and are tested with.
TESTED_VERSIONS = {"nemo_toolkit": "2.7.", "megatron-core": "0.15."}


@contextmanager
def cpu_platform() -> Iterator[None]:
    """Let NeMo and Megatron build, train, evaluate, save and load without CUDA. Enter before the model is built.

    The pretence holds for the thread that enters (torch function modes are per thread) and ends with the context,
    whatever happens inside: torch and NeMo are then as before.

    Raises:
        ValueError: a CUDA device can be seen, so a run meant for the CPU could mix the two.
        RuntimeError: an installed library is not of a version that this was tested with.
        AttributeError: a replaced name no longer exists.
    """
    if torch.cuda.is_available():
        raise ValueError("PLATFORM=cpu: a CUDA device is visible; set CUDA_VISIBLE_DEVICES= or use PLATFORM=gpu")
    for package, prefix in TESTED_VERSIONS.items():
        if not version(package).startswith(prefix):
            raise RuntimeError(f"PLATFORM=cpu: {package} is {version(package)}; cpu_platform was tested with {prefix}x")
    with ExitStack() as stack:
        for owner, name, stand_in in _stand_ins():
            stack.enter_context(_replaced(owner, name, stand_in))
        stack.enter_context(_CudaIsCpu())
        yield


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)  # AttributeError when a library has dropped the name
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, what it answers meanwhile). torch 2.13, NeMo 2.7.3, megatron-core 0.15.3."""
    cuda = torch.cuda
    # "Initialized" makes torch's own RNG functions act at once, and NeMo's _fix_tensors_device (io/pl.py) load a
    # checkpoint; without it: "Torch not compiled with CUDA enabled" and an AssertionError.
    yield cuda, "_initialized", True
    # torch.cuda.manual_seed, get_rng_state and megatron.core.tensor_parallel.random index this tuple: IndexError.
    yield cuda, "default_generators", (torch.default_generator,)
    yield cuda, "current_device", lambda: 0
    yield cuda.random, "current_device", lambda: 0
    # nemo.lightning.megatron_init._set_random_seed seeds Megatron's RNG tracker only where it counts a device;
    # without: "cuda rng state model-parallel-rng is not added" at the first use.
    yield cuda, "device_count", lambda: 1
    # Lightning, Megatron's timers, pipeline and checkpoint code wait for the device; nothing runs behind our back.
    yield cuda, "synchronize", lambda device=None: None
    yield cuda, "empty_cache", lambda: None  # Lightning, after restoring, where CUDA says that it is initialized
    # NeMo wraps DDP's construction in a side stream (megatron_parallel.py, init_model_parallel).
    yield cuda, "Stream", SimpleNamespace
    yield cuda, "stream", lambda stream: nullcontext()

    from nemo.collections.llm.peft import lora, utils

    if not lora.HAVE_TE:
        # LoRA.transform compares every target with te.Linear, also where te could not be imported: UnavailableError.
        yield lora, "te", SimpleNamespace(Linear=None)
        # True without Transformer Engine, since Megatron then still has the classes' names; but one of them is None:
        # "isinstance() arg 2 must be a type" in get_adapter_attributes_from_linear.
        yield utils, "HAVE_TE", False


class _CudaIsCpu(TorchFunctionMode):
    """Answer every torch call for a CUDA device with the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron sorts parameters and checks gradients by type name: clip_grad_by_total_norm_fp32 and the
            # distributed optimizer refuse any but 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = (args[0], *(_on_cpu(arg) for arg in args[1:]))
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return func(*args, **(kwargs or {}))


def _on_cpu(device: Any) -> Any:
    """Return the CPU for anything that names a CUDA device ("cuda", "cuda:0", torch.device, ordinal), else the same."""
    if isinstance(device, torch.device):
        is_cuda = device.type == "cuda"
    elif isinstance(device, str):
        is_cuda = device.startswith("cuda")
    else:
        is_cuda = isinstance(device, int) and not isinstance(device, bool)
    return torch.device("cpu") if is_cuda else device
