"""Dropout on the adapter's input whose masks are drawn again in the backward instead of kept.

A mask follows from (run's seed, sample, layer and target, place in the sequence): no generator's history matters, so it is
the same however often it is drawn, in whatever order layers and micro-batches come, and whoever draws it.

    CPU  every rank draws the sample's whole mask and cuts its part: the same masks, and losses, under every layout
    GPU  a rank draws its part only, from a key that names the part: the same masks under the same layout. Ranks that hold
         the same activations draw the same mask, all others another one

What a mask costs when kept: a byte per element, 2.7 GB at TP 4 and four micro-batches of 8,192 tokens in a row.
CUDA graphs replay a kernel with the seed that it was captured with, so they need `kept_mask`: drawn from Megatron's
generators, which graphs know, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

# An entry beside the generators in Megatron's tracker. Recomputation and the warm-up put the tracker back to what it was, and
# so with it the micro-batch that a layer is at, also where pipelining has begun other micro-batches since.
MICRO_BATCH = "adapter-micro-batch"


def begin_micro_batch() -> None:
    """Tell the adapters that the forward pass of this rank's next training micro-batch begins."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states(tracker.get_states() | {MICRO_BATCH: _micro_batch() + 1})


def _micro_batch() -> int:
    return get_cuda_rng_tracker().get_states().get(MICRO_BATCH, -1)


@dataclass
class AdapterDropout:
    """Dropout of one adapter's input, [S, B, H] of this rank.

    tokens_sharded, features_sharded: whether tensor parallelism shards S or H. keep_masks: for CUDA graphs.
    """

    probability: float
    seed: int
    tokens_sharded: bool
    features_sharded: bool
    keep_masks: bool = False
    name: str = ""  # of the adapter, with the global index of its layer

    @property
    def scale(self) -> float:
        """What the kept elements are multiplied by."""
        return 1.0 / (1.0 - self.probability)

    def redraw(self, x_SBH: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that draws this micro-batch's mask, [S, B, H], True where an element stays; the same at every call."""
        shape, device, micro_batch = x_SBH.shape, x_SBH.device, _micro_batch()
        draw = self._draw_own_part if device.type == "cuda" else self._cut_from_whole
        samples = self._samples(micro_batch, shape[1])
        return lambda: torch.stack([draw(sample, shape[0], shape[2], device) for sample in samples], dim=1)

    def kept_mask(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """A mask from Megatron's generators, which differs between the tensor-parallel ranks where the input does."""
        mask = torch.empty(x_SBH.shape, dtype=torch.bool, device=x_SBH.device)
        if self.tokens_sharded or self.features_sharded:
            with get_cuda_rng_tracker().fork():
                return mask.bernoulli_(1.0 - self.probability)
        return mask.bernoulli_(1.0 - self.probability)

    def _samples(self, micro_batch: int, rows: int) -> range:
        """Places in the run's training order of this micro-batch's rows (data.micro_batches)."""
        dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        first = (micro_batch * dp + rank) * rows
        return range(first, first + rows)

    def _bernoulli(self, key: str, tokens: int, features: int, device: torch.device) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed}:dropout:{key}".encode(), digest_size=7).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
        return torch.empty((tokens, features), dtype=torch.bool, device=device).bernoulli_(
            1.0 - self.probability, generator=generator
        )

    def _draw_own_part(self, sample: int, tokens: int, features: int, device: torch.device) -> torch.Tensor:
        part = [parallel_state.get_context_parallel_rank()]
        if self.tokens_sharded or self.features_sharded:
            part.append(parallel_state.get_tensor_model_parallel_rank())
        return self._bernoulli(f"{sample}:{self.name}:{part}", tokens, features, device)

    def _cut_from_whole(self, sample: int, tokens: int, features: int, device: torch.device) -> torch.Tensor:
        tp, tp_rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        cut_tokens, cut_features = tp if self.tokens_sharded else 1, tp if self.features_sharded else 1
        whole = self._bernoulli(f"{sample}:{self.name}", tokens * cut_tokens * cp, features * cut_features, device)
        # Megatron cuts a sequence into 2 * CP chunks: rank r has r and 2 * CP - 1 - r (get_batch_on_this_cp_rank).
        chunks = whole.chunk(2 * cp)
        mine = torch.cat([chunks[cp_rank], chunks[-1 - cp_rank]]) if cp > 1 else whole
        return mine.chunk(cut_tokens)[tp_rank % cut_tokens].chunk(cut_features, dim=1)[tp_rank % cut_features]
