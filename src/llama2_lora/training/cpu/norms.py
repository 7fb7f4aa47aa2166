"""Norms of Transformer Engine's extension (transformer_engine/pytorch/csrc/extensions/normalization.cpp).

Shapes: T tokens, H hidden size. All is computed in fp32 and cast once, as the kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu.dtypes import TORCH_DTYPE, DType
from llama2_lora.training.cpu.quantize import quantize


def rmsnorm_fwd(
    input_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    """`rmsnorm_fwd`: normed rows [T, H] (quantized where there is a quantizer), no mean, 1 / root mean square [T]."""
    x_TH = input_TH.float()
    rsigma_T = torch.rsqrt(x_TH.pow(2).mean(-1) + eps)
    out_TH = (x_TH * rsigma_T[:, None] * _gamma(weight_H, zero_centered_gamma)).to(TORCH_DTYPE[otype])
    if quantizer is not None:
        return quantize(out_TH, quantizer, ln_out), None, rsigma_T
    return out_TH if ln_out is None else ln_out.copy_(out_TH), None, rsigma_T


def rmsnorm_bwd(
    dz_TH: Tensor, x_TH: Tensor, rsigma_T: Tensor, gamma_H: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """`rmsnorm_bwd`: gradients of the input [T, H] and of the weight [H], both in the weight's type."""
    dz, x, rsigma = dz_TH.float(), x_TH.float(), rsigma_T[:, None]
    normed = x * rsigma
    scaled = dz * _gamma(gamma_H, zero_centered_gamma)
    dx = rsigma * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(gamma_H.dtype), (dz * normed).sum(0).to(gamma_H.dtype)


def _gamma(weight_H: Tensor, zero_centered: bool) -> Tensor:
    return weight_H.float() + 1 if zero_centered else weight_H.float()
