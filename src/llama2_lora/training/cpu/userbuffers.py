"""Userbuffers of Transformer Engine's extension (csrc/extensions/comm_gemm_overlap.cpp), with blocking collectives.

On GPUs a tensor-parallel collective runs in pieces beside the matrix product that makes or takes its rows. Here the buffers
are plain tensors and the whole collective runs before the product (all-gather) or after it (reduce-scatter): Transformer
Engine's own control flow decides what is sent, from and to where, and a setting that loses a sum loses it here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama2_lora.training.cpu.device import Stream
from llama2_lora.training.cpu.dtypes import CommOverlapAlgo, CommOverlapType


class CommOverlapHelper:
    """The process groups of `initialize_ub`: its own bootstrap group, of which the tensor-parallel group is a part."""

    def __init__(self, world_group: Any = None, intra_node_group: Any = None) -> None:
        self.group = intra_node_group if intra_node_group is not None else world_group


class CommOverlap:
    """One layer's buffer, [rows, columns]: this rank's rows are chunk `rank` of `tp_size`."""

    def __init__(
        self,
        buffer_shape: Sequence[int],
        buffer_dtype: torch.dtype,
        helper: CommOverlapHelper,
        tp_size: int,
        *_: Any,
        **__: Any,
    ) -> None:
        from megatron.core import parallel_state

        self.group = parallel_state.get_tensor_model_parallel_group()
        self.size, self.rank = tp_size, torch.distributed.get_rank(self.group)
        # NeMo names no dtype, so TE asks for bf16; the CPU's activations are fp32
        wide = torch.float32 if buffer_dtype == torch.bfloat16 else buffer_dtype
        self.buffer = torch.zeros(tuple(buffer_shape), dtype=wide)

    def is_fp8_ubuf(self) -> bool:
        return self.buffer.dtype == torch.uint8

    def is_atomic_gemm(self) -> bool:
        return False

    def is_p2p_overlap(self) -> bool:
        return isinstance(self, CommOverlapP2P)

    def set_buffer_params(self, quantizer: Any) -> None: ...

    def get_communication_stream(self) -> tuple[Stream, Stream]:
        return Stream(), Stream()

    def copy_into_buffer(self, input: Tensor, local_chunk: bool = False) -> None:
        """Fill the whole buffer, or this rank's rows."""
        self._rows(local_chunk).copy_(input.reshape(-1))

    def get_buffer(self, local_chunk: bool = False, shape: Sequence[int] | None = None) -> Tensor:
        """The whole buffer or this rank's rows, as a view of the buffer in `shape`."""
        rows = self._rows(local_chunk)
        if shape is None:
            return rows.view(-1, self.buffer.shape[-1])
        return rows[: math.prod(shape)].view(tuple(shape))

    def _rows(self, local_chunk: bool) -> Tensor:
        return self.buffer.view(-1).chunk(self.size)[self.rank] if local_chunk else self.buffer.view(-1)

    def all_gather(self) -> None:
        rows = [torch.empty_like(self._rows(True)) for _ in range(self.size)]
        torch.distributed.all_gather(rows, self._rows(True).clone(), group=self.group)
        self.buffer.view(-1).copy_(torch.cat(rows))

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum of all ranks' `whole`."""
        total = whole.contiguous().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total.chunk(self.size)[self.rank]


class CommOverlapP2P(CommOverlap):
    """The same buffer, sent around in a ring."""


def before_gemm(comm: CommOverlap, kind: CommOverlapType, bulk: bool) -> None:
    if kind == CommOverlapType.AG:
        comm.all_gather()


def after_gemm(comm: CommOverlap, kind: CommOverlapType, bulk: bool, result: Tensor, extra_output: Tensor | None) -> None:
    if kind != CommOverlapType.RS:
        return
    if bulk:
        raise NotImplementedError("transformer_engine_torch.generic_gemm: no CPU kernel with a bulk reduce-scatter")
    extra_output.copy_(comm.reduce_scatter(result).view(extra_output.shape))


def bulk_overlap_ag_with_external_gemm(comm: CommOverlap, send_stream: Stream, recv_stream: Stream) -> None:
    """`bulk_overlap_ag_with_external_gemm`: the all-gather that runs beside another GEMM."""
    comm.all_gather()


def device_supports_multicast(device: int = -1) -> bool:
    return True


def ubuf_built_with_mpi() -> bool:
    return False


def get_stream_priority_range(device: int = -1) -> tuple[int, int]:
    return 0, -1


def get_num_cublas_streams() -> int:
    return 4


__all__ = ["CommOverlap", "CommOverlapAlgo", "CommOverlapHelper", "CommOverlapP2P"]
