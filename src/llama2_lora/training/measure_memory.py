"""Bytes of one rank by kind, read from the built model and from what autograd keeps of one micro-batch.

The names are those of forecast/measured.py, which puts preflight's account beside them. Nothing here is timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from llama2_lora.forecast.measured import MemoryItem, Names

# What Transformer Engine's quantized tensors hold: they are wrappers without a storage of their own. 2.9.
INNER = ("_data", "_transpose", "_rowwise_data", "_columnwise_data", "_rowwise_scale_inv", "_columnwise_scale_inv")
TRANSPOSES = ("_transpose", "_columnwise_data", "_columnwise_scale_inv")


def memory_items(trainer: Any, kept: Counter[str]) -> list[MemoryItem]:
    """Every kind that is there. `kept` is from `kept_for_backward`."""
    found = _weights(trainer.strategy.megatron_parallel) + _optimizer(trainer) + kept
    return [MemoryItem(name, size, name in Names.PER_LAYER) for name in Names.ALL if (size := found[name])]


def _weights(model: torch.nn.Module) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            found[Names.ADAPTER] += _bytes([weight])
        elif ".layers." in name and weight.dim() > 1:
            for kind, tensors in _parts(weight).items():
                found[kind] += _bytes(tensors)
        else:
            found[Names.OUTSIDE] += _bytes([weight])
    found[Names.COPIES] += sum(_bytes([copy]) for copy in _copies(model))
    return found


def _copies(model: torch.nn.Module) -> Iterator[Any]:
    """Quantized copies of weights that are kept beside them."""
    for module in model.modules():
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.module.base.TransformerEngineBaseModule._fp8_workspaces
        yield from getattr(module, "_fp8_workspaces", {}).values()


def _parts(weight: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    transposes = [x for name in TRANSPOSES if torch.is_tensor(x := getattr(weight, name, None))]
    held = [x for x in _inner(weight) if all(x is not y for y in transposes)]
    return {Names.LINEAR: held, Names.COPIES: transposes}


def _optimizer(trainer: Any) -> Counter[str]:
    from llama2_lora.training.warmup import _torch_optimizers

    gradients = [b.grad_data for chunk in trainer.strategy.megatron_parallel for b in getattr(chunk, "buffers", [])]
    state: list[torch.Tensor] = []
    for optimizer in (inner for outer in trainer.optimizers for inner in _torch_optimizers(outer)):
        state += [p for group in optimizer.param_groups for p in group["params"]]
        state += [x for values in optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
    return Counter({Names.GRADIENTS: _bytes(gradients), Names.ADAMW: _bytes(state)})


@contextmanager
def kept_for_backward(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """Bytes that the first micro-batch's forward pass keeps for its backward pass, by kind; filled when the block ends.

    Each storage counts once, for the module that kept it first. Weights do not count.
    """
    sizes: Counter[str] = Counter()
    storages: dict[int, tuple[int, str]] = {}
    kept: list[torch.Tensor] = []  # alive until the end of the pass: no other tensor gets the same address
    watch = _Watch(model)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if watch.counting:
            for inner in _inner(tensor):
                storage = inner.untyped_storage()
                storages.setdefault(storage.data_ptr(), (storage.nbytes(), _kind(watch.where)))
                kept.append(inner)
        return tensor

    with watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    weights = {x.untyped_storage().data_ptr() for x in _all_weights(model)}
    for address, (size, kind) in storages.items():
        if address not in weights:
            sizes[kind] += size


class _Watch:
    """Which module's forward pass is running, while the first micro-batch is in the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.done = False
        self.handles: list[Any] = []

    @property
    def counting(self) -> bool:
        return bool(self.stack) and not self.done

    @property
    def where(self) -> str:
        return self.stack[-1]

    def __enter__(self) -> None:
        hooks = torch.nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        if self.stack or isinstance(module, GPTModel):
            self.stack.append(self.names.get(module, ""))

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        if self.stack:
            self.stack.pop()
            self.done = self.done or not self.stack


def _kind(module: str) -> str:
    """Of what a module keeps, by its name in the model."""
    if "decoder" not in module:
        return Names.LOGITS
    if ".layers." not in module:
        return Names.REST
    if ".adapter" in module or "linear_proj" in module:  # the frozen layer itself keeps nothing
        return Names.ADAPTERS_KEPT
    if "linear_qkv" in module or "linear_fc1" in module or "layernorm" in module:
        return Names.NORMS
    if "self_attention" in module:
        return Names.ATTENTION
    return Names.SWIGLU if module.endswith(".mlp") else Names.REST


def _inner(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors inside of a quantized one; a plain one itself."""
    found = [x for name in INNER if torch.is_tensor(x := getattr(tensor, name, None))]
    return found or ([tensor] if torch.is_tensor(tensor) else [])


def _all_weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for weight in (*model.parameters(), *model.buffers()):
        yield from _inner(weight)
    for copy in _copies(model):
        yield from _inner(copy)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(inner.numel() * inner.element_size() for tensor in tensors for inner in _inner(tensor))
