"""From NVFP4 to FP8 in the middle of a run: four bits are fast, eight win back the last hundredths of the loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from mlperf_logging.mllog import constants

from llama2_lora.config.settings import Settings
from llama2_lora.mlperf_log import MLPerfLog
from llama2_lora.training.callback import precisions


class Heal(pl.Callback):
    """Switch the linear layers to FP8 before step FP4_HEAL_STEP + 1, the first one that runs in FP8."""

    def __init__(self, settings: Settings, log: MLPerfLog) -> None:
        self.settings, self.mlperf_log = settings, log

    def __deepcopy__(self, memo: dict) -> Heal:
        return self  # NeMo records its callbacks' arguments by copying them

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.settings.precision.fp4_heal_step:
            switch_to_fp8(trainer.strategy.megatron_parallel, self.settings.precision.fp8_format)
            linear = precisions(pl_module.config)[constants.LOWEST_NUMERICAL_PRECISION_IN_LINEAR]
            self.mlperf_log.tracked({"linear_precision": linear}, trainer.global_step * self.settings.global_batch_size)


def switch_to_fp8(model: torch.nn.Module, fp8_format: str) -> None:
    """Let Megatron enter FP8's context from the next forward pass on, with the recipe that the config holds.

    Transformer Engine 2.9 notices the other recipe there: it makes new quantizers, drops the FP4 copies of the weights and
    quantizes the bf16 weights again, once (module/base.py, init_fp8_metadata). Delayed scaling starts with a scale of 1.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "fp4", None):
            config.fp4, config.fp8 = None, fp8_format
