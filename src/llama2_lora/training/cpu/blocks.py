"""FP8 with a scale per block: 128 x 128 or 1 x 128 (common/transpose/quantize_transpose_*_blockwise.cu), and MXFP8, 1 x 32.

A block's scale looks along the product's inner dimension, so the copies by rows and by columns hold other numbers.

    format               values in a block          scale                                   copy by columns
    blockwise, weights   128 x 128                  fp32, a power of two, multiplied back   transposed bytes
    blockwise, others    128 of a row (a column)    the same; one row of scales per block   transposed bytes
    MXFP8                32 of a row (a column)     e8m0: the exponent of a power of two    bytes in the tensor's own order
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llama2_lora.training.cpu.dtypes import TORCH_DTYPE
from llama2_lora.training.cpu.per_tensor import cast_fp8, scale_from_amax

BLOCKWISE, MX = 128, 32
EXPONENT_BIAS = 127  # of fp32, and of e8m0


def quantize_blockwise(tensor: Tensor, quantizer: Any, output: Any) -> None:
    """Write [..., n]; the copy by columns is that of the transpose, but for the compact form that is all-gathered."""
    rows_MN = tensor.float().reshape(-1, tensor.shape[-1])
    compact = quantizer.all_gather_usage
    if output._rowwise_data is not None:
        data, scale_inv = _blockwise(rows_MN, quantizer)
        output._rowwise_data.copy_(data.view(output._rowwise_data.shape))
        _place(scale_inv.t() if quantizer.block_scaling_dim == 1 and not compact else scale_inv, output._rowwise_scale_inv)
    if output._columnwise_data is not None:
        data, scale_inv = _blockwise(rows_MN.t().contiguous(), quantizer)
        output._columnwise_data.copy_((data.t() if compact else data).reshape(output._columnwise_data.shape))
        _place(scale_inv.t() if quantizer.block_scaling_dim == 1 else scale_inv, output._columnwise_scale_inv)


def _blockwise(values_MN: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes [M, N] and what they are multiplied by: [M, N / 128], or [M / 128, N / 128] of square blocks (rounded up)."""
    rows, columns = values_MN.shape
    height = BLOCKWISE if quantizer.block_scaling_dim == 2 else 1
    padded = functional.pad(values_MN, (0, -columns % BLOCKWISE, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // BLOCKWISE, BLOCKWISE)
    fp8 = TORCH_DTYPE[quantizer.dtype]
    amax = blocks.abs().amax((1, 3))
    scale = scale_from_amax(amax, torch.finfo(fp8).max, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = cast_fp8(blocks * scale[:, None, :, None], fp8).view(padded.shape)
    return data[:rows, :columns], scale.reciprocal()


def _place(scales: Tensor, padded: Tensor) -> None:
    """Write scales into a buffer that cuBLAS wants larger."""
    padded.zero_()[: scales.shape[0], : scales.shape[1]] = scales


def blockwise_values(tensor: Any, rowwise: bool) -> Tensor:
    """fp32 values [..., n] that a GEMM reads from one of the copies: Transformer Engine's own Python undoes the layouts."""
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    copies = tensor.get_metadata()
    for name in ("columnwise_data", "columnwise_scale_inv") if rowwise else ("rowwise_data", "rowwise_scale_inv"):
        copies[name] = None
    return Float8BlockwiseQTensorStorage(**copies).dequantize()


def quantize_mxfp8(tensor: Tensor, quantizer: Any, output: Any) -> None:
    """Write [..., n] with blocks along the rows, and once more with blocks along the columns."""
    rows_MN = tensor.float().reshape(-1, tensor.shape[-1])
    fp8 = TORCH_DTYPE[quantizer.dtype]
    if output._rowwise_data is not None:
        data, exponents = _mxfp8(rows_MN, fp8)
        output._rowwise_data.copy_(data.view(output._rowwise_data.shape))
        _place(exponents, output._rowwise_scale_inv)
    if output._columnwise_data is not None:
        data, exponents = _mxfp8(rows_MN.t().contiguous(), fp8)
        output._columnwise_data.copy_(data.t().reshape(output._columnwise_data.shape))
        _place(exponents.t(), output._columnwise_scale_inv)


def _mxfp8(values_MN: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bytes [M, N] and e8m0 exponents [M, N / 32]: of the smallest power of two that keeps the block within the type."""
    blocks = values_MN.view(values_MN.shape[0], -1, MX)
    exponents = to_e8m0(blocks.abs().amax(-1) / torch.finfo(fp8).max)
    inverse = torch.where(exponents == 0, torch.ones(()), _power(2 * EXPONENT_BIAS - exponents.int()))
    return cast_fp8(blocks * inverse[..., None], fp8).view(values_MN.shape), exponents


def to_e8m0(values: Tensor) -> Tensor:
    """The exponents of positive fp32 values, rounded up to a power of two (common/util/ptx.cuh, float_to_e8m0)."""
    bits = values.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    return (exponent + up.int()).to(torch.uint8)


def _power(exponents: Tensor) -> Tensor:
    """2 ** (e - 127), fp32, of e8m0 exponents e."""
    bits = exponents.int()
    return torch.where(bits == 0, torch.full_like(bits, 0x400000), bits << 23).view(torch.float32)  # 2 ** -127 is subnormal


def mxfp8_values(tensor: Any, rowwise: bool) -> Tensor:
    """fp32 values [..., n] that a GEMM reads from one of the copies."""
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    if data is None:
        raise RuntimeError(f"transformer_engine_torch: the MXFP8 tensor has no copy by {'rows' if rowwise else 'columns'}")
    values_MN = data.view(TORCH_DTYPE[tensor._fp8_dtype]).float().reshape(-1, data.shape[-1])
    rows, columns = values_MN.shape
    if rowwise:
        scale = _power(tensor._rowwise_scale_inv[:rows, : columns // MX])
        values = values_MN.view(rows, -1, MX) * scale[..., None]
    else:
        scale = _power(tensor._columnwise_scale_inv[: rows // MX, :columns])
        values = values_MN.view(-1, MX, columns) * scale[:, None]
    return values.reshape(data.shape)
