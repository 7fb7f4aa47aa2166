"""Matrix products of Transformer Engine's extension (transformer_engine/pytorch/csrc/extensions/gemm.cpp).

cuBLAS thinks in columns, so the roles look swapped: the result is op(B) @ op(A), rows of B against rows of A.

    layer, what it computes              A                   B                      transA  transB  result
    forward                              weight [N, K]       input [..., K]         yes     no      [..., N]
    gradient of the input (dgrad)        weight [K, N]       gradient [..., K]      no      no      [..., N]
    gradient of the weight (wgrad)       input [T, N]        gradient [T, M]        no      yes     [M, N]

A quantized operand is read from the copy that the GPU's kernel would read: a copy that is missing is an error here too.
Products and sums are fp32, so results differ from a GPU's by the order of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu import userbuffers
from llama2_lora.training.cpu.blocks import blockwise_values, mxfp8_values
from llama2_lora.training.cpu.dtypes import TORCH_DTYPE, CommOverlapType, DType
from llama2_lora.training.cpu.nvfp4 import nvfp4_values
from llama2_lora.training.cpu.per_tensor import rowwise_bytes
from llama2_lora.training.cpu.quantize import any_fp8_layout, is_quantized, quantize


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: userbuffers.CommOverlap | None = None,
    comm_type: CommOverlapType | None = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Tensor | None]:
    """`gemm`: the product, the bias' gradient where `grad`, no GELU input, and the reduce-scattered rows.

    With `comm_overlap`, the collective that a GPU would run beside the product runs before it (all-gather) or after it
    (reduce-scatter).
    """
    if gelu:
        raise NotImplementedError("transformer_engine_torch.generic_gemm: no CPU kernel with a fused GELU")
    if comm_overlap is not None:
        userbuffers.before_gemm(comm_overlap, comm_type, bulk_overlap)
    a = _operand(A, rowwise=transA)
    b = _operand(B, rowwise=not transB)
    a = a.reshape(-1, a.shape[-1])
    if transB:
        b = b.reshape(-1, b.shape[-1]).t()
    product = torch.matmul(b, a.t() if transA else a)
    if alpha != 1.0:
        product = product * alpha
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.reshape(-1, b.shape[-1]).sum(-1 if transB else 0).to(TORCH_DTYPE[bias_type])
    elif bias is not None:
        product = product + bias
    result = _store(product, D, quantizer, _result_dtype(A, D, out_dtype), accumulate)
    if comm_overlap is not None:
        userbuffers.after_gemm(comm_overlap, comm_type, bulk_overlap, result, extra_output)
    return result, bias_gradient, None, extra_output


def _operand(tensor: Any, rowwise: bool) -> Tensor:
    """fp32 values [..., K] of a GEMM's operand, from its copy by rows or from the one by columns."""
    if not is_quantized(tensor):
        return tensor.float()
    for prefix, values in _VALUES.items():
        if type(tensor).__name__.startswith(prefix):
            return values(tensor, rowwise)
    raise NotImplementedError(f"transformer_engine_torch.generic_gemm: no CPU kernel for {type(tensor).__name__}")


def _per_tensor_values(tensor: Any, rowwise: bool) -> Tensor:
    fp8 = TORCH_DTYPE[tensor._fp8_dtype]
    # Hopper's FP8 products want both operands by rows, so "by columns" is the transpose; later parts read either copy.
    if tensor._data is not None and (rowwise or any_fp8_layout()):
        return tensor._data.view(fp8).float() * tensor._scale_inv
    if tensor._transpose is None or tensor._transpose_invalid or (rowwise and not any_fp8_layout()):
        wanted = "rows" if rowwise else "columns"
        raise RuntimeError(f"transformer_engine_torch.generic_gemm: the FP8 operand has no copy by {wanted}")
    return rowwise_bytes(tensor).view(fp8).float() * tensor._scale_inv


_VALUES: dict[str, Callable[[Any, bool], Tensor]] = {
    "Float8Blockwise": blockwise_values,
    "Float8Tensor": _per_tensor_values,
    "MXFP8": mxfp8_values,
    "NVFP4": nvfp4_values,
}


def _result_dtype(A: Any, D: Tensor | None, out_dtype: DType | None) -> torch.dtype:
    if out_dtype is not None:
        return TORCH_DTYPE[out_dtype]
    return D.dtype if D is not None else A.dtype


def _store(product: Tensor, D: Any, quantizer: Any, dtype: torch.dtype, accumulate: bool) -> Any:
    """The product in its place: quantized, in the given tensor D (added to it if `accumulate`), or a new one."""
    if quantizer is not None:
        return quantize(product.to(dtype), quantizer, D)
    if D is None:
        return product.to(dtype)
    product = product.view(D.shape)
    return D.add_(product) if accumulate else D.copy_(product)
