"""Multi-tensor functions of Transformer Engine's extension (transformer_engine/pytorch/csrc/extensions/multi_tensor/).

Each takes lists of tensors of any shapes, list by list, and changes them in place. `chunk_size` and the overflow flag
`noop` serve the GPU's launches; the flag is 0 here, since fp32 and bf16 training scales no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w_mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """`multi_tensor_adam_cuda`: one step over [gradients, parameters, exp_avg, exp_avg_sq] and perhaps [master weights].

    With master weights these are stepped, and the parameters become their rounded copies.
    """
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, exp_avg, exp_avg_sq, *master in zip(*tensor_lists, strict=True):
        weight = master[0] if master else parameter
        g = gradient.float()
        if not adam_w_mode:
            g = g + weight_decay * weight
        exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + eps)
        if adam_w_mode:
            update = update + weight_decay * weight
        weight.sub_(lr * update)
        if master:
            parameter.copy_(weight)


def multi_tensor_l2norm(chunk_size: int, noop: Tensor, tensor_lists: Lists, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """`multi_tensor_l2norm_cuda`: the norm over all tensors, [1], and of each, [tensors] (empty unless asked for)."""
    norms = [tensor.float().norm() for tensor in tensor_lists[0]]
    each = torch.stack(norms) if norms else torch.zeros(0)
    return each.norm().view(1), each if per_tensor else torch.zeros(0)


def multi_tensor_scale(chunk_size: int, noop: Tensor, tensor_lists: Lists, scale: float) -> None:
    """`multi_tensor_scale_cuda`: [sources, targets]; a target becomes its source times `scale`."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
