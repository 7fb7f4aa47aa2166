"""torch.cuda's answers for one pretended device, which is the CPU.

Megatron Core, NeMo and Transformer Engine spell their device "cuda" and ask torch about it. Rather than replace their
functions one by one, `stand_ins` and `CudaIsCpu` answer at the one place that they all ask. What runs here runs at once and
in order: a stream, an event and a wait have nothing to do.

The random generator of the pretended device *is* the CPU generator, so Megatron's RNG tracker, seeding and dropout work
unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from llama2_lora.config.settings import Precision
from llama2_lora.training.cpu import graphs

HOPPER, BLACKWELL = (9, 0), (10, 0)  # compute capabilities: what Transformer Engine chooses kernels by


def capability_for(precision: Precision) -> tuple[int, int]:
    """The first part that computes in this precision."""
    return BLACKWELL if precision.fp4 or (precision.fp8 and precision.fp8_recipe == "mxfp8") else HOPPER


class Stream:
    """torch.cuda.Stream where all work is done when its call returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """torch.cuda.Event that has always happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class _Generators(tuple):
    """The generator of every device, whatever its index: NeMo asks by ordinal, Megatron by current_device()."""

    def __getitem__(self, _: Any) -> graphs.DeviceGenerator:
        return super().__getitem__(0)


def stand_ins(capability: tuple[int, int]) -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, what it answers meanwhile). torch 2.13, Transformer Engine 2.9, NeMo 2.7.3, megatron-core 0.15.3."""
    cuda = torch.cuda
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], name="CPU", multi_processor_count=1, total_memory=80 << 30
    )
    yield cuda, "is_available", lambda: True
    # "Initialized" makes torch's own RNG functions act at once, and NeMo's _fix_tensors_device (io/pl.py) load a
    # checkpoint; without it: "Torch not compiled with CUDA enabled" and an AssertionError.
    # PRIVATE: torch 2.13 torch.cuda._initialized
    # PRIVATE: torch 2.13 torch.cuda._lazy_init
    yield cuda, "_initialized", True
    yield cuda, "_lazy_init", lambda: None
    # torch.cuda.manual_seed, get_rng_state and megatron.core.tensor_parallel.random index this tuple: IndexError.
    yield cuda, "default_generators", _Generators((graphs.DeviceGenerator(),))
    yield cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state()
    yield cuda, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state)
    yield cuda, "manual_seed", torch.manual_seed
    yield cuda, "current_device", lambda: 0
    yield cuda.random, "current_device", lambda: 0
    yield cuda, "set_device", lambda device: None
    yield cuda, "device", lambda device: nullcontext()
    # nemo.lightning.megatron_init._set_random_seed seeds Megatron's RNG tracker only where it counts a device;
    # without: "cuda rng state model-parallel-rng is not added" at the first use.
    yield cuda, "device_count", lambda: 1
    yield cuda, "get_device_name", lambda device=None: properties.name
    yield cuda, "get_device_capability", lambda device=None: capability
    yield cuda, "get_device_properties", lambda device=None: properties
    # Lightning, Megatron's timers, pipeline and checkpoint code wait for the device; nothing runs behind our back.
    yield cuda, "synchronize", lambda device=None: None
    yield cuda, "empty_cache", lambda: None  # Lightning, after restoring, where CUDA says that it is initialized
    # NeMo wraps DDP's construction in a side stream (megatron_parallel.py, init_model_parallel).
    yield cuda, "Stream", Stream
    yield cuda, "Event", Event
    yield cuda, "stream", lambda stream: nullcontext()
    yield cuda, "current_stream", lambda device=None: Stream()
    yield cuda, "set_stream", lambda stream: None
    yield cuda, "memory_stats", lambda device=None: defaultdict(int)  # Megatron says how much the graphs of its layers took
    yield from graphs.stand_ins()
    yield torch.version, "cuda", "13.0"  # Transformer Engine asks for it before it scales FP8 in blocks
    # The libraries' small fusions are for torch.compile, whose inductor asks for the properties of a real device.
    # PRIVATE: torch 2.13 torch._dynamo.config.disable
    yield torch._dynamo.config, "disable", True
    yield torch.autograd, "_engine_run_backward", _run_backward
    for name in ("range_push", "range_pop", "mark"):  # NVTX: marks for NVIDIA's profiler
        yield cuda.nvtx, name, lambda *_: None


_IS_CUDA = torch.Tensor.is_cuda.__get__
# PRIVATE: torch 2.13 torch.autograd._engine_run_backward
_ENGINE = torch.autograd._engine_run_backward


def _run_backward(*arguments: Any, **options: Any) -> Any:
    """A mode is off inside the function that it answers for: torch.autograd.backward, and so in all that runs backward."""
    with CudaIsCpu():
        return _ENGINE(*arguments, **options)


class CudaIsCpu(TorchFunctionMode):
    """Answer every torch call for a CUDA device with the CPU, and call every tensor one of CUDA's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory and torch.cuda.is_current_stream_capturing():
            raise graphs.CaptureError("pin_memory while a CUDA graph is captured")
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.device and args and isinstance(args[0], int):
            return func("cuda", args[0])  # "Cannot access accelerator device when none is available"
        if func == _IS_CUDA:  # a new object at every access: equal, not the same
            return True
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
