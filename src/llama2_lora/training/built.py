"""What was built, in the log's terms: hyperparameters, layout and precisions as the objects have them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_micro_batch_size,
    get_num_microbatches,
)
from mlperf_logging.mllog import constants

from llama2_lora.config.settings import Settings
from llama2_lora.training.adapter import SeededLoRA


def built_values(trainer: pl.Trainer, model: pl.LightningModule, settings: Settings) -> dict[str, Any]:
    """Hyperparameters as the built objects have them, not as the settings asked for them."""
    optimizer = trainer.optimizers[0]
    group, config, schedule = optimizer.param_groups[0], model.optim.config, trainer.lr_scheduler_configs[0].scheduler
    lora = next(cb for cb in trainer.callbacks if isinstance(cb, SeededLoRA))
    return {
        constants.OPT_BASE_LR: group["initial_lr"],
        constants.OPT_ADAMW_WEIGHT_DECAY: group["weight_decay"],
        constants.OPT_GRADIENT_CLIP_NORM: config.clip_grad,
        constants.OPT_LR_WARMUP_FACTOR: schedule.warmup_steps / schedule.max_steps,
        constants.OPT_LR_TRAINING_STEPS: schedule.max_steps,
        "lora_rank": lora.dim,
        "lora_alpha": lora.alpha,
        constants.GLOBAL_BATCH_SIZE: get_current_global_batch_size(),
        constants.GRADIENT_ACCUMULATION_STEPS: get_num_microbatches(),
        constants.TRAIN_SAMPLES: trainer.datamodule.train_rows,
        constants.EVAL_SAMPLES: trainer.datamodule.validation_rows,
        "target_accuracy": settings.evaluation.target_loss,
        constants.MICRO_BATCH_SIZE: get_micro_batch_size(),
        constants.TENSOR_PARALLELISM: parallel_state.get_tensor_model_parallel_world_size(),
        constants.PIPELINE_PARALLELISM: parallel_state.get_pipeline_model_parallel_world_size(),
        constants.CONTEXT_PARALLELISM: parallel_state.get_context_parallel_world_size(),
        constants.EXPERT_PARALLELISM: parallel_state.get_expert_model_parallel_world_size(),
        constants.CONFIG_FILENAME: f"config_{settings.system.name}.sh",
        **precisions(model.config),
    }


def precisions(config: Any) -> dict[str, str]:
    """Lowest precision of linear layers, attention and communication, from the built model's config."""
    base = "bfloat16" if config.bf16 else "fp32"
    linear = "nvfp4" if getattr(config, "fp4", None) else "fp8" if config.fp8 else base
    return {
        constants.LOWEST_NUMERICAL_PRECISION_IN_LINEAR: linear,
        constants.LOWEST_NUMERICAL_PRECISION_IN_ATTN: "fp8" if config.fp8_dot_product_attention else base,
        constants.LOWEST_NUMERICAL_PRECISION_IN_COMM: _communication_precision(config, linear, base),
    }


def _communication_precision(config: Any, linear: str, base: str) -> str:
    """Transformer Engine quantizes before it gathers: a linear layer's input over TP, keys and values over CP."""
    if config.sequence_parallel and linear != base:
        return linear
    return "fp8" if config.fp8_dot_product_attention and config.context_parallel_size > 1 else base
