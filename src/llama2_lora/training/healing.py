"""From NVFP4 to FP8 in the middle of a run: four bits are fast, eight win back the last hundredths of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import transformer_engine_torch as tex
from megatron.core.fp8_utils import get_fp8_recipe
from mlperf_logging.mllog import constants
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch import fp8_model_init
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Tensor

from llama2_lora.config.settings import Settings
from llama2_lora.mlperf_log import MLPerfLog
from llama2_lora.training.built import precisions
from llama2_lora.training.graphs import rebuild_graphs
from llama2_lora.training.model import prepare_fp8_weights
from llama2_lora.training.shared_callback import SharedCallback


class Heal(SharedCallback):
    """Switch the linear layers to FP8 before step FP4_HEAL_STEP + 1, the first one that runs in FP8."""

    def __init__(self, settings: Settings, log: MLPerfLog) -> None:
        self.settings, self.mlperf_log = settings, log

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.settings.precision.fp4_heal_step:
            switch_to_fp8(trainer.strategy.megatron_parallel, self.settings.precision.fp8_format)
            if self.settings.performance.graphs != "none":
                rebuild_graphs(trainer.strategy.megatron_parallel)
            linear = precisions(pl_module.config)[constants.LOWEST_NUMERICAL_PRECISION_IN_LINEAR]
            self.mlperf_log.tracked({"linear_precision": linear}, trainer.global_step * self.settings.global_batch_size)


def switch_to_fp8(model: torch.nn.Module, fp8_format: str) -> None:
    """Let Megatron enter FP8's context from the next forward pass on, with the recipe that the config holds.

    Transformer Engine 2.9 notices the other recipe there: it makes new quantizers, drops the FP4 copies of the weights and
    quantizes the bf16 weights again, once (module/base.py, init_fp8_metadata). Delayed scaling starts with a scale of 1.
    Weights that are NVFP4 themselves (FP4_PARAMS) would end in "Recipe mismatch": they become FP8 weights here.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "fp4", None):
            config.fp4, config.fp4_param, config.fp8 = None, False, fp8_format
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), NVFP4Tensor):
            requantize(module, get_fp8_recipe(module.config))


@contextmanager
def switched_for_now(model: torch.nn.Module, fp8_format: str) -> Iterator[None]:
    """Inside, `model` is as switch_to_fp8 leaves it; afterwards as before, with the weights and quantizers that it had."""
    flag = FP8GlobalStateManager.skip_fp8_weight_update_tensor  # graphs of layers read it at every replay
    with _kept(model):
        switch_to_fp8(model, fp8_format)
        try:
            yield
        finally:
            FP8GlobalStateManager.reset()  # it lists every amax history that it has met, and would go on reducing them
            FP8GlobalStateManager.skip_fp8_weight_update_tensor = flag


@contextmanager
def _kept(model: torch.nn.Module) -> Iterator[None]:
    """What the switch changes, put back: attributes of the configs and of Transformer Engine's layers, among them dictionaries
    of parameters, quantizers and copies of weights."""
    owners = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    owners += [module for module in model.modules() if isinstance(module, TransformerEngineBaseModule)]
    states = [(owner, dict(vars(owner))) for owner in owners]
    dicts = [(value, dict(value)) for _, state in states for value in state.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        for value, items in [*((vars(owner), state) for owner, state in states), *dicts]:
            value.clear()
            value.update(items)


def requantize(module: torch.nn.Module, recipe: Recipe) -> None:
    """The NVFP4 weight of one of Transformer Engine's linear layers -> an FP8 one of `recipe`, as if it had been built so."""
    values = module.weight.dequantize()
    # What the layer's constructor does: quantizers first, then the weight. MXFP8 needs the copy by columns (model.py).
    module.fp8_initialized = False
    with torch.no_grad(), fp8_model_init(enabled=True, recipe=recipe):
        module.init_fp8_metadata()
    quantizer = module.quantizers["scaling_fwd"][tex.FP8FwdTensors.GEMM1_WEIGHT]
    quantizer.set_usage(rowwise=True, columnwise=recipe.mxfp8())
    quantizer.internal = False
    old, module.weight = module.weight, torch.nn.Parameter(quantizer(values), requires_grad=False)
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(old, name):
            setattr(module.weight, name, getattr(old, name))
    prepare_fp8_weights(module)
    with torch.no_grad():
        module.weight.copy_(values)  # once more, with the scale that prepare_fp8_weights has set
