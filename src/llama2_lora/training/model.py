"""The model: NeMo's Llama with a loss that is a mean over tokens within a row, then a mean over rows.

Each row's loss weights sum to 1 before context parallelism cuts the row (data.py), so a rank's loss is a plain sum and the
sum over ranks is exact under every layout, evaluation included: padding rows weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections.llm.gpt.model.llama import LlamaConfig, LlamaModel
from nemo.lightning.megatron_parallel import MegatronLossReduction

from llama2_lora.training import graphs
from llama2_lora.training.dropout import begin_micro_batch

# A power of two, so exact: e4m3 holds |w| from 2.4e-4 with all its digits, and up to 7. Llama-2's are about 0.01.
FP8_WEIGHT_SCALE = 64.0


def data_step(batches: Iterator[Any]) -> dict[str, torch.Tensor]:
    """Next micro batch on this rank's device: its context-parallel share of tokens, labels and loss_weights, [B, S/CP]."""
    item = next(batches)
    batch = item[0] if isinstance(item, tuple) else item  # Lightning's iterator yields (batch, index, loader)
    # Pinned: a copy from pageable memory makes the host wait for the GPU, and the next launches with it. CUDA graphs of an
    # iteration bring what is there already (full_cuda_graph.py).
    batch = {name: t if t.is_cuda else t.pin_memory().cuda(non_blocking=True) for name, t in batch.items()}
    return get_batch_on_this_cp_rank(batch)


def forward_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Losses per token, [B, S/CP], on the last pipeline stage; hidden states elsewhere.

    Positions are implied by rotary embeddings and the mask by causal attention: both are None.
    """
    if model.training:
        begin_micro_batch()
    return model(input_ids=batch["tokens"], position_ids=None, attention_mask=None, labels=batch["labels"])


class RowMeanLoss(MegatronLossReduction):
    """Sum of weighted token losses; `rows` is what the sum over all ranks and micro batches is divided by."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, batch: dict[str, torch.Tensor], losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict]:
        total = torch.sum(losses_BS.float() * batch["loss_weights"])
        # Megatron multiplies by CP and divides by the number of micro batches; DDP averages over DP and CP.
        return total / losses_BS.shape[0], {"total": total.detach()}

    def reduce(self, micro_batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        loss = torch.stack([m["total"] for m in micro_batches]).sum()
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return loss / self.rows


def prepare_fp8_weights(model: torch.nn.Module) -> None:
    """FP8_PARAMS: ready the frozen weights for the checkpoint. Does nothing to weights of another precision.

    Delayed scaling starts with a scale of 1 and learns a better one at the optimizer's steps; frozen weights see none, so
    all of |w| < 2**-6 would stay in e4m3's subnormal range (4% to 6% of rms error). And Megatron keeps the random bf16
    start of each for master weights that frozen weights never get: 276 GB of host memory per node.
    Transformer Engine 2.9, megatron-core 0.15.3.
    """
    for weight in model.parameters():
        # PRIVATE: transformer_engine 2.9 transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor._quantizer
        if (quantizer := getattr(weight, "_quantizer", None)) is not None and torch.is_tensor(
            getattr(quantizer, "scale", None)
        ):
            quantizer.scale.fill_(FP8_WEIGHT_SCALE)
        if hasattr(weight, "clear_high_precision_init_val"):
            weight.clear_high_precision_init_val()


def let_gradients_through_recomputation(model: torch.nn.Module) -> None:
    """RECOMPUTE=full: the first layer's input asks for a gradient, although the embedding is frozen.

    A checkpointed function whose inputs need no gradient gets no backward pass, so no adapter in it a gradient either, and
    the run trains nothing without an error (megatron-core 0.15.3, tensor_parallel/random.py, CheckpointFunction). Later
    pipeline stages receive an input that does, from Megatron's communication.
    """
    for embedding in (m for m in model.modules() if isinstance(m, LanguageModelEmbedding)):
        embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: Any, output_SBH: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output_SBH.requires_grad_()


class LoraLlama(LlamaModel):
    """LlamaModel that knows how many rows a training step and an evaluation have."""

    # `config` and `optim` by name: NeMo records arguments and MegatronCommOverlapCallback asks the record for them.
    def __init__(self, config: LlamaConfig, optim: Any, model_transform: Any, train_rows: int, validation_rows: int) -> None:
        super().__init__(config, optim=optim, model_transform=model_transform)
        self.train_loss, self.validation_loss = RowMeanLoss(train_rows), RowMeanLoss(validation_rows)

    def configure_model(self, vp_stage: int | None = None) -> None:
        # Where gradients are on, Transformer Engine 2.9 quantizes FP8 weights with a transposed copy (base.py,
        # reset_parameters) and keeps the bf16 start of each on the host: at 70B 17 GB a GPU and 274 GB a node, for nothing.
        # MXFP8 and NVFP4 need that copy: its scales differ, so the backward pass cannot make it from the other one.
        with torch.set_grad_enabled(self.config.fp8_recipe == "mxfp8" or self.config.fp4_param):
            super().configure_model(vp_stage)
        prepare_fp8_weights(self.module)
        if self.config.recompute_granularity == "full":
            let_gradients_through_recomputation(self.module)
        if self.config.cuda_graph_scope == graphs.ITERATION_SCOPE:
            graphs.keep_rotations(self.module)

    @property
    def training_loss_reduction(self) -> RowMeanLoss:
        return self.train_loss

    @property
    def validation_loss_reduction(self) -> RowMeanLoss:
        return self.validation_loss
