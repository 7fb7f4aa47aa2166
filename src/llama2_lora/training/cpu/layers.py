"""Transformer layers without Transformer Engine, with sequence and context parallelism.

Megatron's plain ("local") layers carry the Transformer Engine layers' names in a checkpoint, and support tensor and
pipeline parallelism. Two of them refuse what the GPU recipe uses: the norm refuses sequence parallelism, the attention
context parallelism. The two modules here take their place; everything else stays Megatron's.

Shapes, all on this rank: S tokens of a sequence, B sequences, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

# Fields of LlamaConfig for this spec: weights made on the CPU, and no kernel that exists for CUDA alone.
CPU_MODEL_OPTIONS: dict[str, bool] = {
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
}


def cpu_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec:
    """Return the specification of the decoder: value for `LlamaConfig.transformer_layer_spec`.

    Raises:
        ValueError: the config asks for what these layers do not compute.
    """
    if config.normalization != "RMSNorm":
        raise ValueError(f"normalization={config.normalization}: the CPU layers have RMSNorm only")
    if config.attention_dropout != 0.0:
        raise ValueError(f"attention_dropout={config.attention_dropout}: the CPU layers have none; set it to 0")
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    # A spec of the whole block, since the final norm of a layer's spec is Megatron's choice.
    return ModuleSpec(TransformerBlock, submodules=TransformerBlockSubmodules(layers, layer_norm=RMSNorm))


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the hidden size; under sequence parallelism each rank norms its own tokens.

    The weight is then marked, so that Megatron sums its gradient over the tensor-parallel ranks, where Megatron's own
    wrapper (`WrappedTorchNorm`) refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(nn.Module):
    """Causal attention with grouped queries; under context parallelism keys and values are gathered from all ranks.

    Like Transformer Engine's with a causal mask type, it makes its own mask and ignores the one that it is given.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the attended values, (S, B, N * D)."""
        ranks = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        length = query_SBND.shape[0]
        positions = [_positions(r, ranks, length, query_SBND.device) for r in range(ranks)]
        if ranks > 1:
            group = parallel_state.get_context_parallel_group()
            # Forward: concatenation along S in rank order; backward: each rank gets the sum of its slice's gradients.
            key_SBGD = gather_from_sequence_parallel_region(key_SBGD, group=group)
            value_SBGD = gather_from_sequence_parallel_region(value_SBGD, group=group)
        visible = positions[rank][:, None] >= torch.cat(positions)[None, :]
        out_BNSD = functional.scaled_dot_product_attention(
            query_SBND.permute(1, 2, 0, 3),
            key_SBGD.permute(1, 2, 0, 3),
            value_SBGD.permute(1, 2, 0, 3),
            attn_mask=visible,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


def _positions(rank: int, ranks: int, length: int, device: torch.device) -> Tensor:
    """Return the places in the whole sequence of the `length` tokens that a context-parallel rank holds.

    Megatron cuts a sequence into 2 * ranks chunks and gives rank r chunks r and 2 * ranks - 1 - r, so that causal work
    is even (`megatron.core.utils.get_batch_on_this_cp_rank`).
    """
    if ranks == 1:
        return torch.arange(length, device=device)
    chunk = torch.arange(length // 2, device=device)
    return torch.cat([chunk + rank * (length // 2), chunk + (2 * ranks - 1 - rank) * (length // 2)])
