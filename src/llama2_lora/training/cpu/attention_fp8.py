"""FP8 attention: what cuDNN's FP8 kernels round, in plain torch.

Queries, keys, values and the output's gradient come as FP8; inside, the softmax S and the gradient dS that both products of the
backward pass read are rounded to FP8 with scales of their own, whose amax is noted for delayed scaling. cuDNN is closed, so its
order of sums and the place of the softmax scale are assumptions; what is rounded, and with which scale, are not.

Shapes: [B, N, S, D], keys and values repeated for every query head; log of the softmax's sum [B, N, S].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu.dtypes import DType
from llama2_lora.training.cpu.quantize import dequantize, quantize


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, s_quantizer: Any) -> tuple[Tensor, Tensor]:
    """Attended values, fp32, and the log of the softmax's sum."""
    logits = _logits(q, k, scale, causal)
    log_sum_exp = logits.logsumexp(-1)
    return _rounded(torch.exp(logits - log_sum_exp[..., None]), s_quantizer) @ v, log_sum_exp


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    causal: bool,
    s_quantizer: Any,
    dp_quantizer: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, fp32."""
    softmax = torch.exp(_logits(q, k, scale, causal) - log_sum_exp[..., None])
    dv = _rounded(softmax, s_quantizer).transpose(-1, -2) @ d_out
    ds = softmax * (d_out @ v.transpose(-1, -2) - (d_out * out).sum(-1, keepdim=True))
    ds = _rounded(ds, dp_quantizer) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, dv


def _logits(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    logits = q @ k.transpose(-1, -2) * scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return logits


def _rounded(values: Tensor, quantizer: Any) -> Tensor:
    return dequantize(quantize(values, quantizer), DType.kFloat32)
