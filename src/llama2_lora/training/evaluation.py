"""Evaluation in another layout than training's: whole sequences, while training cuts them over context-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformer_engine.pytorch import DotProductAttention


@contextmanager
def whole_sequences(model: torch.nn.Module) -> Iterator[None]:
    """Inside, context parallelism has one rank: each takes rows of its own and moves no keys or values.

    Without gradients only. The sum of the losses over the data- and context-parallel ranks stays what it is.
    """
    # A group that holds this rank only, on every rank, and that exists already: the model has no experts.
    alone = parallel_state.get_expert_model_parallel_group()
    with ExitStack() as stack:
        # It remembers rotations by length (lru_cache), whatever part of them its group took. Without this, the first training
        # step after an evaluation rotates by whole sequences' positions: another loss, no error (megatron-core 0.15.3).
        stack.callback(RotaryEmbedding.forward.cache_clear)
        for owner, name, value in _rebindings(model, alone):
            stack.enter_context(_rebound(owner, name, value))
        RotaryEmbedding.forward.cache_clear()
        yield


def _rebindings(model: torch.nn.Module, alone: torch.distributed.ProcessGroup) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of all that knows the context-parallel group: megatron-core 0.15.3, Transformer Engine 2.9."""
    # What get_context_parallel_* return; batches are cut by them.
    # PRIVATE: megatron-core 0.15.3 megatron.core.parallel_state._CONTEXT_PARALLEL_GROUP
    yield parallel_state, "_CONTEXT_PARALLEL_GROUP", alone
    # PRIVATE: megatron-core 0.15.3 megatron.core.parallel_state._CONTEXT_PARALLEL_GLOBAL_RANKS
    yield parallel_state, "_CONTEXT_PARALLEL_GLOBAL_RANKS", [torch.distributed.get_rank()]
    configs = {}
    for module in model.modules():
        if isinstance(module, (RotaryEmbedding, DotProductAttention)):
            yield module, "cp_group", alone
        if hasattr(config := getattr(module, "config", None), "context_parallel_size"):
            configs[id(config)] = config
    for config in configs.values():  # how many rotations a rank makes
        yield config, "context_parallel_size", 1


@contextmanager
def _rebound(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
