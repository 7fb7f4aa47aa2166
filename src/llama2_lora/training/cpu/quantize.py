"""The calls that serve every format (transformer_engine/pytorch/csrc/extensions/cast.cpp).

A quantized tensor of Transformer Engine holds its bytes as uint8, twice where both GEMMs of a layer read it: by rows as it
is, and transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu import blocks, nvfp4, per_tensor
from llama2_lora.training.cpu.dtypes import TORCH_DTYPE, DType


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
    kernels = {
        "Float8Quantizer": per_tensor.quantize_delayed,
        "Float8CurrentScalingQuantizer": per_tensor.quantize_current,
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
    dtype = TORCH_DTYPE[otype]
    if hasattr(tensor, "_transpose"):
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._fp8_dtype
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._scale_inv
        return (per_tensor.rowwise_bytes(tensor).view(TORCH_DTYPE[tensor._fp8_dtype]).float() * tensor._scale_inv).to(dtype)
    if type(tensor).__name__.startswith("MXFP8"):
        return blocks.mxfp8_values(tensor, rowwise=True).to(dtype)
    raise NotImplementedError(f"transformer_engine_torch.dequantize: no CPU kernel for {type(tensor).__name__}")


def is_quantized(tensor: Any) -> bool:
    return hasattr(tensor, "_quantizer")
