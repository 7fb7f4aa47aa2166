"""What a training process does for the first time after run_start: graphs that torch.compile makes, kernels that are called."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from llama2_lora.mlperf_log import MLPerfLog


def watch_compilation(report: dict[str, Any]) -> None:
    """Graphs that torch.compile has made when the clock starts, and when it stops. It traces, and runs what it traced as it is:
    the pretended device has no code generator, for which the CPU platform turns torch.compile off. Call it before Megatron is
    imported."""
    import torch
    from torch._dynamo.utils import counters

    from llama2_lora.training.cpu import device

    torch.compile = functools.partial(torch.compile, backend="eager")  # before Megatron decorates its small fusions
    stand_ins = device.stand_ins
    device.stand_ins = lambda capability: (found for found in stand_ins(capability) if found[1] != "disable")

    def count(name: str) -> None:
        report[f"graphs at {name}"] = counters["stats"]["unique_graphs"]

    for name in ("run_start", "run_stop"):
        _before_event(name, functools.partial(count, name))


def watch_kernels(report: dict[str, Any]) -> None:
    """Calls of Transformer Engine's extension, by types and shapes: how many kinds there were before run_start, and those of
    them that came after it only. Call it inside the CPU platform."""
    extension = sys.modules["transformer_engine_torch"]
    known: set[str] = set()
    late: list[str] = []
    started: list[bool] = []

    def watched(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def call(*arguments: Any, **options: Any) -> Any:
            kind = f"{name}{_kind(arguments)}{_kind(options)}"
            if kind not in known:
                known.add(kind)
                if started:
                    late.append(kind)
            return kernel(*arguments, **options)

        return call

    for name, kernel in list(vars(extension).items()):
        if inspect.isfunction(kernel):
            setattr(extension, name, watched(name, kernel))

    def start() -> None:
        started.append(True)
        report["kernels before run_start"] = len(known)
        report["kernels after it only"] = late

    _before_event("run_start", start)


def _kind(value: Any) -> str:
    """Types and shapes of arguments. A vector's length, as that of all scales of a model, tells no kernel from another."""
    import torch

    if isinstance(value, torch.Tensor):
        shape = list(value.shape) if value.dim() > 1 else f"{value.dim()}d"
        return f"{type(value).__name__}{value.dtype}{shape}"
    if isinstance(value, dict):
        return repr({name: _kind(item) for name, item in value.items()})
    if isinstance(value, (list, tuple)):
        return repr(sorted({_kind(item) for item in value})) if isinstance(value, list) else repr([*map(_kind, value)])
    return repr(value) if isinstance(value, (bool, type(None))) else type(value).__name__


def _before_event(name: str, act: Callable[[], None]) -> None:
    event = getattr(MLPerfLog, name)

    def acted(self: MLPerfLog, *arguments: Any) -> None:
        act()
        event(self, *arguments)

    setattr(MLPerfLog, name, acted)
