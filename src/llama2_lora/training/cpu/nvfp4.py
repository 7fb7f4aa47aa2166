"""NVFP4: four bits a value, a scale per 16 values and one per tensor (common/transpose/*nvfp4*.cu, csrc/quantizer.cpp).

A value is e2m1, one of +-(0, 0.5, 1, 1.5, 2, 3, 4, 6). It stands for value * block scale (e4m3) * amax / (6 * 448): the
largest block scale of a tensor is then e4m3's largest number. Weights share a scale over blocks of 16 x 16, so that both
copies agree; the copy by columns of activations and gradients may be turned by a random Hadamard transform, and gradients
are rounded stochastically. Bit-identical to Transformer Engine's own reference, experimental/quantization_nvfp4.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 16
FP4_MAX, SCALE_MAX = 6.0, 448.0  # e2m1's and e4m3's largest numbers
FP32_MAX = torch.finfo(torch.float32).max
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIGNED_E2M1 = torch.cat((E2M1, -E2M1))  # by code: the fourth bit is the sign
# Between neighbours, the last magnitude that is rounded down: ties go to the even code, so every other one lies just below.
LAST_DOWN = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
LAST_DOWN[1::2] = torch.nextafter(LAST_DOWN[1::2], torch.zeros(1))


def quantize_nvfp4(tensor: Tensor, quantizer: Any, output: Any) -> None:
    """Write [..., n] by rows, and the transpose [n, ...] by rows into the copy by columns."""
    rows_MN = tensor.float().reshape(-1, tensor.shape[-1])
    if output._rowwise_data is not None:
        _write(rows_MN, quantizer, output._rowwise_data, output._rowwise_scale_inv, output._amax_rowwise)
    if output._columnwise_data is not None:
        columns_NM = rows_MN.t().contiguous()
        if quantizer.with_rht:
            columns_NM = (columns_NM.view(-1, BLOCK) @ quantizer.rht_matrix.float()).view(columns_NM.shape)
        _write(columns_NM, quantizer, output._columnwise_data, output._columnwise_scale_inv, output._amax_columnwise)


def _write(values_MN: Tensor, quantizer: Any, data: Tensor, scale_inv: Tensor, amax: Tensor) -> None:
    amax.copy_(values_MN.abs().amax())
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    packed, scales = to_fp4(values_MN, amax, quantizer.with_2d_quantization, quantizer.stochastic_rounding)
    data.copy_(packed.view(data.shape))
    scale_inv.zero_()[: scales.shape[0], : scales.shape[1]] = scales  # padded for cuBLAS, which skips the rest


def to_fp4(values_MN: Tensor, amax: Tensor, square_blocks: bool, stochastic: bool) -> tuple[Tensor, Tensor]:
    """[M, N] fp32 -> two codes a byte [M, N / 2], the first in the low half, and e4m3 scales as bytes [M, N / 16]."""
    rows, columns = values_MN.shape
    blocks = values_MN.view(rows, columns // BLOCK, BLOCK)
    block_amax = blocks.abs().amax(-1)
    if square_blocks:
        block_amax = block_amax.view(rows // BLOCK, BLOCK, -1).amax(1).repeat_interleave(BLOCK, 0)
    encode = (SCALE_MAX * FP4_MAX / amax).clamp(max=FP32_MAX)
    encode = torch.where(encode == 0, torch.ones_like(encode), encode)
    scales = (block_amax / FP4_MAX * encode).clamp(max=SCALE_MAX).to(torch.float8_e4m3fn)
    factor = (1 / (scales.float() * (1 / encode))).clamp(max=FP32_MAX)
    codes = _codes(blocks * factor[..., None], stochastic).view(rows, columns)
    return codes[:, ::2] + codes[:, 1::2] * 16, scales.view(torch.uint8)


def _codes(values: Tensor, stochastic: bool) -> Tensor:
    """The nearest e2m1 code of each value, or of its two neighbours one, by chance: the nearer the likelier."""
    magnitude = values.abs().clamp(max=FP4_MAX)
    if stochastic:
        below = (torch.bucketize(magnitude, E2M1, right=True) - 1).clamp(max=len(E2M1) - 2)
        distance = (magnitude - E2M1[below]) / (E2M1[below + 1] - E2M1[below])
        code = below + (torch.rand_like(magnitude) < distance)
    else:
        code = torch.bucketize(magnitude, LAST_DOWN)
    return (code + 8 * (values < 0)).to(torch.uint8)


def nvfp4_values(tensor: Any, rowwise: bool) -> Tensor:
    """fp32 values [..., n] that a GEMM reads from one of the copies. A Hadamard transform stays in: its pair undoes it."""
    data, scale_inv, amax = (
        (tensor._rowwise_data, tensor._rowwise_scale_inv, tensor._amax_rowwise)
        if rowwise
        else (tensor._columnwise_data, tensor._columnwise_scale_inv, tensor._amax_columnwise)
    )
    if data is None:
        raise RuntimeError(f"transformer_engine_torch: the NVFP4 tensor has no copy by {'rows' if rowwise else 'columns'}")
    values = from_fp4(data.reshape(-1, data.shape[-1]), scale_inv, amax)
    return values.view(*data.shape[:-1], -1) if rowwise else values.t()


def from_fp4(packed_MN: Tensor, scale_inv: Tensor, amax: Tensor) -> Tensor:
    """Bytes [M, N / 2] -> values [M, N]."""
    codes = torch.stack((packed_MN & 15, packed_MN >> 4), -1).view(packed_MN.shape[0], -1)
    rows, columns = codes.shape
    scales = scale_inv[:rows, : columns // BLOCK].contiguous().view(torch.float8_e4m3fn).float()
    scales = scales * (amax / (FP4_MAX * SCALE_MAX))
    return (SIGNED_E2M1[codes.int()].view(rows, -1, BLOCK) * scales[..., None]).view(rows, columns)
