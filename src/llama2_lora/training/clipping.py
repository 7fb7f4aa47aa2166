"""Gradient clipping that the host does not wait for.

Megatron reads the gradient norm from the GPU at every step, to decide in Python whether it clips: the host then cannot
enqueue the next step while this one runs. Here norm and coefficient stay on the device. The numbers are the same.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.optimizer import optimizer

# Sources of what is replaced, megatron-core 0.15.3 (optimizer/clip_grads.py): another version must be looked at first.
REPLACED = {
    "get_grad_norm_fp32": "7fa2ba2493d43f1d",
    "clip_grad_by_total_norm_fp32": "8edb9da5365045a5",
}


@contextmanager
def clipping_on_device() -> Iterator[None]:
    """Inside, Megatron's optimizers read no gradient norm. RuntimeError where Megatron's functions are not the known ones."""
    for name, expected in REPLACED.items():
        source = inspect.getsource(getattr(optimizer, name)).encode()
        if (found := hashlib.sha256(source).hexdigest()[:16]) != expected:
            raise RuntimeError(f"megatron-core's {name} is another one ({found}, not {expected}): look at training/clipping.py")
    with patch.multiple(optimizer, get_grad_norm_fp32=grad_norm, clip_grad_by_total_norm_fp32=clip):
        yield


def grad_norm(
    grads_for_norm: Any, norm_type: float = 2.0, grad_stats_parallel_group: torch.distributed.ProcessGroup | None = None
) -> torch.Tensor:
    """Norm over all ranks' gradients, a scalar tensor on their device."""
    assert norm_type == 2.0
    gradients = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else grads_for_norm
    # A rank may hold nothing that counts: a part of the buffer that is all duplicates of another rank's.
    device = gradients[0].device if gradients else torch.device("cuda", torch.cuda.current_device())
    squared = torch.nn.utils.get_total_norm(gradients).square() if gradients else torch.zeros((), device=device)
    squared = squared.to(device, torch.float32)
    torch.distributed.all_reduce(squared, group=grad_stats_parallel_group)
    return squared.sqrt()


def clip(parameters: Any, max_norm: float, total_norm: torch.Tensor, use_decoupled_grad: bool = False) -> None:
    """Scale the gradients by max_norm / total_norm where that is below 1."""
    assert not use_decoupled_grad
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
