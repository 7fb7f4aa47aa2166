"""The adapter: LoRA on linear_qkv and linear_proj, started and gathered the same way under every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.collections.llm.peft import LoRA

from llama2_lora.llama2 import ADAPTED, adapter_name
from llama2_lora.training.dropout import AdapterDropout
from llama2_lora.training.low_rank import AdaptedLinear, LowRankAdapter


class SeededLoRA(LoRA):
    """NeMo's LoRA with adapters that move little (low_rank.py), and an A that does not depend on the layout.

    Megatron's generators give another A under TP=2 or PP=2 than on one rank. Here each layer draws its full matrix from
    (seed, layer, target) and keeps its shard: Kaiming uniform as in the paper's code, B stays zero. keep_masks: see dropout.py.
    """

    def __init__(self, seed: int, rank: int, alpha: int, dropout: float, keep_masks: bool = False) -> None:
        super().__init__(
            target_modules=list(ADAPTED),
            dim=rank,
            alpha=alpha,
            dropout=dropout,
            dropout_position="pre",
            lora_A_init_method="kaiming",
        )
        self.seed, self.keep_masks = seed, keep_masks

    def transform(self, m: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """The module itself, or with an adapter where it is a target."""
        if self.match(m, name, prefix) is None:
            return m
        row_parallel = name == "linear_proj"
        if hasattr(m, "layer_norm_weight") and (m.normalization != "RMSNorm" or m.zero_centered_gamma):
            raise ValueError(f"{prefix}.{name}: its norm must be a plain RMSNorm, the adapter applies no other")
        dropout = AdapterDropout(
            self.dropout,
            self.seed,
            tokens_sharded=m.config.sequence_parallel and not row_parallel,
            features_sharded=row_parallel,
            keep_masks=self.keep_masks,
        )
        return AdaptedLinear(m, LowRankAdapter(m.weight, row_parallel, self.dim, self.alpha, dropout, m.config))

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        model = super().__call__(model)
        for name, adapter in adapters(model):
            adapter.dropout.name = name
        for name, weight in adapter_weights(model):
            if name.endswith("linear_in.weight") and not weight.is_meta:
                weight.data.copy_(_shard(initial_a(self.seed, name, _full_shape(weight)), weight))
        return model


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, LowRankAdapter]]:
    """(name with the global layer index, adapter) of every adapter on this pipeline stage."""
    for layer in (m for m in model.modules() if isinstance(m, TransformerLayer)):
        for target in ADAPTED:
            yield adapter_name(layer.layer_number - 1, target), getattr(layer.self_attention, target).adapter


def adapter_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with the global layer index, this rank's shard) of every adapter matrix on this pipeline stage."""
    for name, adapter in adapters(model):
        yield f"{name}.linear_in.weight", adapter.linear_in.weight  # A: [r, in]
        yield f"{name}.linear_out.weight", adapter.linear_out.weight  # B: [out, r]


def gather_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All adapter matrices, whole, fp32 on the CPU; complete on rank 0. Every rank must call it."""
    mine = {name: _unshard(weight).float().cpu() for name, weight in adapter_weights(model)}
    stages: list[dict] = [{} for _ in range(parallel_state.get_pipeline_model_parallel_world_size())]
    torch.distributed.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def _tp_dimension(weight: torch.nn.Parameter) -> int | None:
    """The dimension that tensor parallelism shards, None where it shards nothing."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1 or not getattr(weight, "tensor_model_parallel", False):
        return None
    return weight.partition_dim


def _full_shape(weight: torch.nn.Parameter) -> list[int]:
    shape = list(weight.shape)
    if (dim := _tp_dimension(weight)) is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def _shard(full: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
    if (dim := _tp_dimension(weight)) is None:
        return full
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return full.chunk(tp, dim)[rank]


def _unshard(weight: torch.nn.Parameter) -> torch.Tensor:
    shard = weight.detach()
    if (dim := _tp_dimension(weight)) is None:  # asked of the parameter: a detached tensor has lost Megatron's attributes
        return shard
    shards = [torch.empty_like(shard) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(shards, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim)


def initial_a(seed: int, name: str, shape: list[int]) -> torch.Tensor:
    """U(-1/sqrt(in), 1/sqrt(in)), [r, in], fp32: Kaiming uniform with a = sqrt(5), as LoRA's reference code starts A."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape, device="cpu").uniform_(-1.0, 1.0, generator=generator) / shape[1] ** 0.5
