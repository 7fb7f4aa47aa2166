"""Fused attention of Transformer Engine's extension (transformer_engine/pytorch/csrc/extensions/attention.cpp).

Shapes: S tokens of a sequence, B sequences, N query heads, G key/value heads, D head size. Tensors come as [S, B, N, D]
("sbhd") or [B, S, N, D] ("bshd"), as their layout says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu import attention_fp8
from llama2_lora.training.cpu.dtypes import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)
from llama2_lora.training.cpu.quantize import is_quantized, quantize

_aten = torch.ops.aten
_CAUSAL = (NVTE_Mask_Type.NVTE_CAUSAL_MASK, NVTE_Mask_Type.NVTE_CAUSAL_BOTTOM_RIGHT_MASK)
# Of softmax, its random state: fp32 training without attention dropout draws nothing from it.
_RNG_STATE = (0, 0)


def get_fused_attn_backend(is_training: bool, q_dtype: Any, kv_dtype: Any, *_: Any) -> NVTE_Fused_Attn_Backend:
    """`get_fused_attn_backend`: which of cuDNN's kernels serves; here one for any length, and one for FP8."""
    is_fp8 = q_dtype in (DType.kFloat8E4M3, DType.kFloat8E5M2)
    return NVTE_Fused_Attn_Backend.NVTE_FP8 if is_fp8 else NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Any,
    K: Any,
    V: Any,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Tensor | None,
    page_table_v: Tensor | None,
    s_quantizer: Any,
    o_quantizer: Any,
    Bias: Tensor | None,
    SoftmaxOffset: Tensor | None,
    rng_gen: torch.Generator | None,
    rng_elts_per_thread: int,
    return_max_logit: bool,
) -> list[Any]:
    """`fused_attn_fwd`: attended values in the queries' shape, the log of the softmax's sum [B, N, S, 1], a random state."""
    causal = _checked(p_dropout, bias_type, attn_mask_type, softmax_type, window_size, max_seqlen_q, max_seqlen_kv)
    if return_max_logit or page_table_k is not None:
        raise NotImplementedError("transformer_engine_torch.fused_attn_fwd: no CPU kernel with logits or paged keys")
    sequence_first = _sequence_first(qkv_layout)
    q, k, v = (_heads_first(_plain(t), sequence_first) for t in (Q, K, V))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if is_quantized(Q):
        out, log_sum_exp = attention_fp8.forward(q, k, v, attn_scale, causal, s_quantizer)
        out = quantize(_sequence_back(out, sequence_first).to(fake_dtype), o_quantizer)
        # cuDNN's [M, ZInv]: Transformer Engine takes the first for the log of the sum (context_parallel.py).
        return [out, log_sum_exp[..., None], torch.ones_like(log_sum_exp)[..., None], torch.tensor(_RNG_STATE)]
    # PRIVATE: torch 2.13 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = _bottom_right(attn_mask_type, q, k)
    out, log_sum_exp = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=attn_scale
    )
    return [_sequence_back(out, sequence_first), log_sum_exp.float()[..., None], torch.tensor(_RNG_STATE)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Any,
    K: Any,
    V: Any,
    O: Any,  # noqa: E741  the extension's name
    dO: Any,
    fake_dtype: torch.dtype,
    dqkv_type: Any,
    Aux_CTX_Tensors: list[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
) -> list[Any]:
    """`fused_attn_bwd`: gradients of queries, keys and values in their shapes; none of a bias or a softmax offset.

    Under context parallelism the output and the log of the sum are those of the whole softmax, the keys a rank's share.
    """
    causal = _checked(p_dropout, bias_type, attn_mask_type, softmax_type, window_size, max_seqlen_q, max_seqlen_kv)
    sequence_first = _sequence_first(qkv_layout)
    q, k, v, out, d_out = (_heads_first(_plain(t), sequence_first) for t in (Q, K, V, O, dO))
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    log_sum_exp = Aux_CTX_Tensors[0].squeeze(-1)
    if is_quantized(Q):
        gradients = attention_fp8.backward(d_out, q, k, v, out, log_sum_exp, attn_scale, causal, s_quantizer, dp_quantizer)
    else:
        # PRIVATE: torch 2.13 torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        mask = _bottom_right(attn_mask_type, q, k)
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, log_sum_exp, 0.0, causal and mask is None, attn_mask=mask, scale=attn_scale
        )
    dq, dk, dv = gradients
    dk, dv = (t.unflatten(1, (groups, repeats)).sum(2) for t in (dk, dv))
    found = [_sequence_back(t, sequence_first).to(fake_dtype) for t in (dq, dk, dv)]
    if dqkv_quantizer is not None:
        found = [quantize(t, dqkv_quantizer) for t in found]
    return [*found, None, None]


def _checked(
    dropout: float, bias: Any, mask: Any, softmax: Any, window: tuple[int, int], length_q: int, length_kv: int
) -> bool:
    """Whether the attention is causal. Raises for what the kernels here do not compute."""
    causal = mask in _CAUSAL
    asked = {
        "attention dropout": dropout != 0.0,
        f"{bias.name}": bias != NVTE_Bias_Type.NVTE_NO_BIAS,
        f"{mask.name}": not causal and mask != NVTE_Mask_Type.NVTE_NO_MASK,
        f"{mask.name} over {length_q} queries and {length_kv} keys": (
            mask == NVTE_Mask_Type.NVTE_CAUSAL_MASK and length_q != length_kv
        ),
        f"{softmax.name}": softmax != NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX,
        f"a window of {window}": tuple(window) not in ((-1, -1), (-1, 0)),
    }
    if missing := [what for what, asked_for in asked.items() if asked_for]:
        raise NotImplementedError(f"transformer_engine_torch.fused_attn: no CPU kernel with {', '.join(missing)}")
    return causal


def _bottom_right(mask: Any, q_BNSD: Tensor, k_BNSD: Tensor) -> Tensor | None:
    """What to add to the scores where the last query meets the last key and there are more keys than queries, else None."""
    queries, keys = q_BNSD.shape[2], k_BNSD.shape[2]
    if mask != NVTE_Mask_Type.NVTE_CAUSAL_BOTTOM_RIGHT_MASK or queries == keys:
        return None
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=q_BNSD.dtype).masked_fill_(later, float("-inf"))


def _sequence_first(layout: NVTE_QKV_Layout) -> bool:
    for name, first in (("NVTE_SBHD_SBHD_SBHD", True), ("NVTE_BSHD_BSHD_BSHD", False)):
        if layout.name == name:
            return first
    packed = ("NVTE_SB3HD", "NVTE_SBH3D", "NVTE_SBHD_SB2HD", "NVTE_SBHD_SBH2D")
    if layout.name in packed:  # views of one tensor: the three that come in are plain views too
        return True
    raise NotImplementedError(f"transformer_engine_torch.fused_attn: no CPU kernel for the layout {layout.name}")


def _plain(tensor: Any) -> Tensor:
    return tensor.dequantize(dtype=torch.float32) if is_quantized(tensor) else tensor


def _heads_first(tensor: Tensor, sequence_first: bool) -> Tensor:
    """[S, B, N, D] or [B, S, N, D] -> [B, N, S, D]."""
    return tensor.permute(1, 2, 0, 3) if sequence_first else tensor.permute(0, 2, 1, 3)


def _sequence_back(tensor: Tensor, sequence_first: bool) -> Tensor:
    """[B, N, S, D] -> [S, B, N, D] or [B, S, N, D], contiguous as the kernels' outputs are."""
    return (tensor.permute(2, 0, 1, 3) if sequence_first else tensor.permute(0, 2, 1, 3)).contiguous()
