"""Rotary embeddings of Transformer Engine's extension (transformer_engine/pytorch/csrc/extensions/apply_rope.cpp).

Shapes: S tokens of a sequence, B sequences, N heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama2_lora.training.cpu.dtypes import NVTE_QKV_Format


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """`fused_rope_forward`: rotate the halves of every head of [S, B, N, D] by the angles [S or more, 1, 1, D or less]."""
    if start_positions is not None:
        raise NotImplementedError("transformer_engine_torch.fused_rope_forward: no CPU kernel with start positions")
    cos, sin = _angles(freqs, input, qkv_format, interleaved, cp_size)
    return _rotated(input, cos, sin)


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """`fused_rope_backward`: the gradient of the input. The halves' angles need not be the same, so sin turns with them."""
    cos, sin = _angles(freqs, output_grads, qkv_format, interleaved, cp_size)
    return _rotated(output_grads, cos, -sin.roll(sin.shape[-1] // 2, -1))


def fused_qkv_rope_forward(
    qkv_input: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    start_positions: Tensor | None,
    qkv_split_arg_list: list[int],
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cp_size: int,
    cp_rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_qkv_rope_forward`: [S, B, groups, (N / groups + 2) * D] -> [S, B, N, D] and twice [S, B, groups, D]."""
    query, key, value = qkv_input.split(qkv_split_arg_list, dim=-1)
    query = query.reshape(*query.shape[:2], -1, qkv_split_arg_list[1])
    rest = (qkv_format, interleaved, None, cp_size, cp_rank)
    query = fused_rope_forward(query, q_freqs, start_positions, *rest)
    return query, fused_rope_forward(key, k_freqs, start_positions, *rest), value.contiguous()


def fused_qkv_rope_backward(
    q_grad_out: Tensor,
    k_grad_out: Tensor,
    v_grad_out: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    qkv_split_arg_list: list[int],
    qkv_format: NVTE_QKV_Format,
    interleaved: bool,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """`fused_qkv_rope_backward`: the gradient of the packed input."""
    rest = (qkv_format, interleaved, None, cp_size, cp_rank)
    query = fused_rope_backward(q_grad_out, q_freqs, *rest)
    key = fused_rope_backward(k_grad_out, k_freqs, *rest)
    return torch.cat((query.reshape(*key.shape[:3], -1), key, v_grad_out), dim=-1)


def _angles(freqs: Tensor, like: Tensor, qkv_format: NVTE_QKV_Format, interleaved: bool, cp_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [S, 1, 1, D or less]."""
    if interleaved or qkv_format != NVTE_QKV_Format.NVTE_SBHD or cp_size != 1:
        asked = f"interleaved={interleaved}, {qkv_format.name}, cp_size={cp_size}"
        raise NotImplementedError(f"transformer_engine_torch.fused_rope: no CPU kernel for {asked}")
    freqs = freqs[: like.shape[0]]
    return freqs.cos(), freqs.sin()


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin over the first `cos.shape[-1]` of the last dimension; the rest stays."""
    turned, rest = tensor[..., : cos.shape[-1]].float(), tensor[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(tensor.dtype), rest), dim=-1)
