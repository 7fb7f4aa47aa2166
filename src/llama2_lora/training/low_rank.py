"""The low-rank pair beside a frozen linear layer: out = W f(x) + alpha / r * B A dropout(f(x)), f the layer's norm or nothing.

Where tensor and sequence parallelism put it (S tokens, H features, t tensor-parallel ranks; only [S, r] is moved):

    linear_qkv   x [S/t, H] -A whole-> [S/t, r] -gather-> [S, r] -B column-parallel-> [S, out/t]
    linear_proj  x [S, H/t] -A row-parallel-> [S, r] partial -reduce-scatter-> [S/t, r] -B whole-> [S/t, out]

The whole factor sees a part of the tokens on each rank, so its gradient is summed over them: `sequence_parallel = True`
on a parameter asks Megatron for that (finalize_model_grads). Without sequence parallelism the tokens are whole, the
collectives become an all-reduce of [S, r] in the backward or the forward, and the whole factors' gradients are equal.

Transformer Engine's linear_qkv norms its input inside. The adapter applies that norm itself, to the layer's input:

    A (m * x / rms(x) * gain) = (A * gain) (m * x) / rms(x)        m the dropout's mask, rms(x) a number per token

so no normed tensor is made or kept, Transformer Engine need not return its own (which would end the overlapped gather, and
keep a quantized copy for the backward), and autograd adds the two gradients of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper
from torch import Tensor, nn

from llama2_lora.training.dropout import AdapterDropout


class AdaptedLinear(AdapterWrapper):
    """A frozen column- or row-parallel linear layer plus its adapter."""

    def forward(self, x_SBH: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        low_rank = self.adapter.project(x_SBH, getattr(self.to_wrap, "layer_norm_weight", None))
        out, bias = self.to_wrap(x_SBH, *arguments, **options)
        return self.adapter.add_to(out, low_rank), bias


class Factor(nn.Module):
    """One matrix of the pair, [out, in] of this rank. sharded_dim: what tensor parallelism shards, None if it is whole."""

    def __init__(self, out: int, inputs: int, sharded_dim: int | None, config: TransformerConfig, device: torch.device) -> None:
        super().__init__()
        self.sharded_dim = sharded_dim
        self.weight = nn.Parameter(torch.zeros(out, inputs, dtype=config.params_dtype, device=device))
        if sharded_dim is None:
            # Not `tensor_model_parallel`: the gradient norm then counts it on the first tensor-parallel rank only.
            self.weight.sequence_parallel = config.sequence_parallel
        else:
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=sharded_dim, stride=1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        axes = {} if self.sharded_dim is None else {"weight": self.sharded_dim}
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, axes, sharded_offsets)


class LowRankAdapter(nn.Module):
    """A (`linear_in`) and B (`linear_out`), both zero until they are initialized, beside a layer of `weight` [out, in]."""

    def __init__(
        self, weight: Tensor, row_parallel: bool, rank: int, alpha: int, dropout: AdapterDropout, config: TransformerConfig
    ) -> None:
        super().__init__()
        out, inputs = weight.shape
        self.row_parallel, self.scale, self.dropout, self.config = row_parallel, alpha / rank, dropout, config
        tp = parallel_state.get_tensor_model_parallel_world_size()
        self.linear_in = Factor(rank, inputs, 1 if row_parallel and tp > 1 else None, config, weight.device)
        self.linear_out = Factor(out, rank, 0 if not row_parallel and tp > 1 else None, config, weight.device)

    def project(self, x_SBH: Tensor, gain_H: Tensor | None) -> Tensor:
        """alpha / r * A dropout(f(x)), [S, B, r], for the tokens of `add_to`. gain_H: f's, None where f is nothing."""
        scale, draw, mask = self.scale, None, None
        if self.training and self.dropout.probability:
            scale *= self.dropout.scale
            if self.dropout.keep_masks:
                mask = self.dropout.kept_mask(x_SBH)
            else:
                draw = self.dropout.redraw(x_SBH)
        if self.config.cpu_offloading and self.config.cpu_offloading_activations:
            x_SBH.activation_offloading = True  # else this reference would keep on the GPU what the layer offloads
        eps = self.config.layernorm_epsilon
        low_rank = _Project.apply(x_SBH, self.linear_in.weight, gain_H, eps, scale, mask, draw)
        if self.row_parallel:
            if self.config.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low_rank)
            return reduce_from_tensor_model_parallel_region(low_rank)
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(low_rank)
        return copy_to_tensor_model_parallel_region(low_rank)

    def add_to(self, out_SBO: Tensor, low_rank_SBR: Tensor) -> Tensor:
        """out + B low_rank, in one product."""
        sum_NO = torch.addmm(out_SBO.flatten(0, 1), low_rank_SBR.flatten(0, 1), self.linear_out.weight.t())
        return sum_NO.view(out_SBO.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata) | (
            self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)
        )


class _Project(torch.autograd.Function):
    """scale * A (mask * f(x)). Keeps x, which the frozen layer keeps too, and [S, B, r]: no mask, no normed or dropped input.

    mask_SBH: a mask to keep; draw: a function that draws it, now and again in the backward; neither: no dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SBH: Tensor,
        a_RH: Tensor,
        gain_H: Tensor | None,
        eps: float,
        scale: float,
        mask_SBH: Tensor | None,
        draw: Callable[[], Tensor] | None,
    ) -> Tensor:
        if gain_H is None:
            factor_SB1: Tensor | float = scale
            inverse_rms_SB1 = None
        else:
            exact = torch.promote_types(x_SBH.dtype, torch.float32)
            norm_SB1 = torch.linalg.vector_norm(x_SBH, dim=-1, keepdim=True, dtype=exact)
            inverse_rms_SB1 = torch.rsqrt(norm_SB1.square() / x_SBH.shape[-1] + eps)
            factor_SB1 = inverse_rms_SB1 * scale
            a_RH = a_RH * gain_H
        low_rank_SBR = _masked(x_SBH, mask_SBH, draw) @ a_RH.t() * factor_SB1
        low_rank_SBR = low_rank_SBR.to(x_SBH.dtype)
        ctx.scale, ctx.draw = scale, draw
        saved_low_rank = None if gain_H is None else low_rank_SBR  # only the norm's gradient needs it
        ctx.save_for_backward(x_SBH, a_RH, gain_H, inverse_rms_SB1, saved_low_rank, mask_SBH)
        return low_rank_SBR

    @staticmethod
    def backward(ctx: Any, gradient_SBR: Tensor) -> tuple[Tensor | None, ...]:
        x_SBH, scaled_a_RH, gain_H, inverse_rms_SB1, low_rank_SBR, mask_SBH = ctx.saved_tensors
        factor_SB1 = ctx.scale if inverse_rms_SB1 is None else inverse_rms_SB1 * ctx.scale
        scaled_SBR = (gradient_SBR * factor_SB1).to(x_SBH.dtype)
        mask_SBH = ctx.draw() if ctx.draw is not None else mask_SBH
        grad_a = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_a = scaled_SBR.flatten(0, 1).t() @ _masked(x_SBH, mask_SBH, None).flatten(0, 1)
            grad_a = grad_a if gain_H is None else grad_a * gain_H
        if ctx.needs_input_grad[0]:
            grad_x = scaled_SBR @ scaled_a_RH
            grad_x = grad_x if mask_SBH is None else grad_x.mul_(mask_SBH)
            if inverse_rms_SB1 is not None:  # x also moves its own rms, and so the token's whole result
                along_SB1 = (gradient_SBR.to(inverse_rms_SB1.dtype) * low_rank_SBR).sum(-1, keepdim=True)
                slope_SB1 = along_SB1 * inverse_rms_SB1.square() / x_SBH.shape[-1]
                grad_x = torch.addcmul(grad_x, x_SBH, slope_SB1.to(x_SBH.dtype), value=-1)
        return grad_x, grad_a, None, None, None, None, None


def _masked(x_SBH: Tensor, mask_SBH: Tensor | None, draw: Callable[[], Tensor] | None) -> Tensor:
    mask_SBH = draw() if draw is not None else mask_SBH
    return x_SBH if mask_SBH is None else x_SBH * mask_SBH
