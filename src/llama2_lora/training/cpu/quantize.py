"""FP8 with one scale per tensor, and the calls that serve every format (transformer_engine/pytorch/csrc/extensions/cast.cpp).

A quantized tensor of Transformer Engine holds its bytes as uint8, twice where both GEMMs of a layer read it: by rows as it
is, and transposed. FP8 keeps value * scale, saturated: the kernels turn what is too large into the largest number, where
torch's cast makes NaN of it in e4m3 and infinity in e5m2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu.dtypes import TORCH_DTYPE, DType

FP32_MAX = torch.finfo(torch.float32).max


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`quantize`: write `tensor` [..., n] into `output`, or into a new tensor of the quantizer's kind.

    Where the flag `noop` is set, the output stays as it is: Transformer Engine skips weights that have not changed.
    """
    kernel = _kernel(quantizer)
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        fit_copies(output, quantizer)
        if quantizer.internal:
            output = _storage_class(output)(**output.get_metadata())
    else:
        fit_copies(output, quantizer)
    if tensor.numel():
        before = [] if noop is None else [(part, part.clone()) for part in _parts(output, quantizer)]
        kernel(tensor.detach(), quantizer, output)
        for part, value in before:  # not `if noop`: a CUDA graph decides anew at every replay
            part.copy_(torch.where(noop.bool().squeeze(), value, part))
    return output


def _parts(output: Any, quantizer: Any) -> list[Tensor]:
    """All that a kernel writes to."""
    owners = (output.get_metadata(), vars(quantizer))
    return [part for owner in owners for part in owner.values() if type(part) is Tensor]


def _kernel(quantizer: Any) -> Callable[[Tensor, Any, Any], None]:
    from llama2_lora.training.cpu import blocks, nvfp4

    kernels = {
        "Float8Quantizer": _quantize_delayed,
        "Float8CurrentScalingQuantizer": _quantize_current,
        "Float8BlockQuantizer": blocks.quantize_blockwise,
        "MXFP8Quantizer": blocks.quantize_mxfp8,
        "NVFP4Quantizer": nvfp4.quantize_nvfp4,
    }
    if (kind := type(quantizer).__name__) not in kernels:
        raise NotImplementedError(f"transformer_engine_torch.quantize: no CPU kernel for {kind}")
    return kernels[kind]


def fit_copies(output: Any, quantizer: Any) -> None:
    """Make and drop the copies of a quantized tensor as its quantizer's usage says (csrc/quantizer.cpp).

    A GPU whose FP8 products take any layout (Blackwell) has no transpose of a tensor with one scale: one copy serves both.
    """
    rowwise, columnwise = quantizer.rowwise_usage, quantizer.columnwise_usage
    if hasattr(output, "_transpose"):
        any_layout = any_fp8_layout()
        wanted = {"_data": rowwise or any_layout, "_transpose": columnwise and not any_layout}
        output._transpose_invalid = not wanted["_transpose"]
    else:
        parts = ("_data", "_scale_inv")
        wanted = {f"_rowwise{part}": rowwise for part in parts} | {f"_columnwise{part}": columnwise for part in parts}
        if hasattr(output, "_amax_rowwise"):
            wanted |= {"_amax_rowwise": rowwise, "_amax_columnwise": columnwise}
    fresh = None
    for name, needed in wanted.items():
        if not needed:
            setattr(output, name, None)
        elif getattr(output, name) is None:
            fresh = fresh if fresh is not None else quantizer.make_empty(output.size(), device="cpu")
            setattr(output, name, getattr(fresh, name))
    if hasattr(output, "_fp8_dtype"):
        output._fp8_dtype = quantizer.dtype


def any_fp8_layout() -> bool:
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    return is_non_tn_fp8_gemm_supported()


def _storage_class(tensor: Any) -> type:
    """The class without a torch.Tensor around it, which Transformer Engine uses inside its modules."""
    return next(c for c in type(tensor).__mro__ if c.__name__.endswith("Storage"))


def dequantize(tensor: Any, otype: DType) -> Tensor:
    """`dequantize`: the values of a tensor quantized by rows."""
    from llama2_lora.training.cpu import blocks

    dtype = TORCH_DTYPE[otype]
    if hasattr(tensor, "_transpose"):
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._fp8_dtype
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._scale_inv
        return (rowwise_bytes(tensor).view(TORCH_DTYPE[tensor._fp8_dtype]).float() * tensor._scale_inv).to(dtype)
    if type(tensor).__name__.startswith("MXFP8"):
        return blocks.mxfp8_values(tensor, rowwise=True).to(dtype)
    raise NotImplementedError(f"transformer_engine_torch.dequantize: no CPU kernel for {type(tensor).__name__}")


def is_quantized(tensor: Any) -> bool:
    return hasattr(tensor, "_quantizer")


# One scale per tensor ---------------------------------------------------------------------------------------------


def _quantize_delayed(tensor: Tensor, quantizer: Any, output: Any) -> None:
    """Delayed scaling: today's scale comes from earlier steps; this step's largest magnitude is noted for later ones."""
    torch.maximum(quantizer.amax, amax_of(tensor), out=quantizer.amax)
    _write(tensor, quantizer.scale, output)


def _quantize_current(tensor: Tensor, quantizer: Any, output: Any) -> None:
    """Current scaling: the scale comes from the tensor itself, or from all ranks' where they share it."""
    if not quantizer.use_existing_amax:
        quantizer.amax.copy_(amax_of(tensor))
    if quantizer.with_amax_reduction:
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8CurrentScalingQuantizer._canonicalized_amax_reduction_group  # noqa: E501
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(quantizer.amax, op=torch.distributed.ReduceOp.MAX, group=group)
    limit = torch.finfo(TORCH_DTYPE[quantizer.dtype]).max
    quantizer.scale.copy_(scale_from_amax(quantizer.amax, limit, quantizer.force_pow_2_scales, quantizer.amax_epsilon))
    _write(tensor, quantizer.scale, output)


def amax_of(tensor: Tensor) -> Tensor:
    """The largest magnitude, fp32, [1]; 0 of an empty tensor."""
    return tensor.abs().amax().float().view(1) if tensor.numel() else torch.zeros(1)


def scale_from_amax(amax: Tensor, limit: float, powers_of_two: bool, epsilon: float) -> Tensor:
    """Scales that bring `amax` (any shape) to `limit`; 1 where it is 0 or infinite (common/recipe/recipe_common.cuh)."""
    amax = amax.clamp(min=epsilon)
    scale = (limit / amax).clamp(max=FP32_MAX)
    if powers_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)  # sign and exponent: rounds towards 0
    return torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)


def cast_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values as bytes of an FP8 type, rounded to nearest even and saturated; same shape."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).view(torch.uint8)


def _write(tensor: Tensor, scale: Tensor, output: Any) -> None:
    data = cast_fp8(tensor.float() * scale, TORCH_DTYPE[output._fp8_dtype])
    # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._data
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._transpose
    # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._transpose_invalid
    if output._transpose is not None:
        output._transpose.copy_(data.reshape(-1, data.shape[-1]).t().reshape(output._transpose.shape))
        output._transpose_invalid = False
    output._scale_inv.copy_(scale.reciprocal())


def rowwise_bytes(tensor: Any) -> Tensor:
    """The bytes [..., n] of a tensor that may hold its transpose [n, ...] alone."""
    if tensor._data is not None:
        return tensor._data
    return tensor._transpose.movedim(0, -1).contiguous()


def fp8_transpose(data: Tensor, dtype: DType, out: Tensor | None = None) -> Tensor:
    """`fp8_transpose`: bytes [..., n] -> [n, ...]."""
    transposed = data.movedim(-1, 0).contiguous()
    if out is not None and out.numel() == transposed.numel():
        return out.copy_(transposed.view(out.shape))
    return transposed


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    amax_compute_algo: str,
    fp8_dtype: DType,
    margin: float,
) -> None:
    """`fused_amax_and_scale_update_after_reduction` (common/recipe/delayed_scaling.cu): the end of a step.

    Per module: history [length, n], newest amax at row 0 and in the buffer (the maximum over ranks), oldest at row 1;
    scale [n]. The history moves up by one row, row 0 becomes 0, and the scale brings the chosen amax to the type's limit.
    """
    limit = torch.finfo(TORCH_DTYPE[fp8_dtype]).max / 2**margin
    offset = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        reduced = amax_reduction_buffer[offset : offset + history.shape[1]]
        offset += history.shape[1]
        newest = torch.where(reduced != 0, reduced, history[0])
        history[0].copy_(newest)
        amax = history.amax(0) if amax_compute_algo == "max" else newest
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        usable = amax.isfinite() & (amax > 0)
        scale.copy_(torch.where(usable, (limit / amax).clamp(max=FP32_MAX), scale))
