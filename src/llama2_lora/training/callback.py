"""Lightning's hooks -> the MLPerf log. It observes and reports, and refuses numbers that show a broken run.

Order of one run: describe, init_stop, run_start, then block (training) and eval by turns, then run_stop.
"""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from mlperf_logging.mllog import constants

from llama2_lora.config.settings import Settings
from llama2_lora.mlperf_log import MLPerfLog, submission_values
from llama2_lora.training.adapter import adapter_weights
from llama2_lora.training.built import built_values
from llama2_lora.training.shared_callback import SharedCallback
from llama2_lora.training.warmup import WarmUp


class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite: the run ends at once."""


class MLPerfCallback(SharedCallback):
    """One run's log. Add it after LoRA's callback, which builds adapters and optimizer, and after the warm-up's."""

    def __init__(self, settings: Settings, log: MLPerfLog, seed: int, warm_up: WarmUp) -> None:
        self.settings, self.mlperf_log, self.seed = settings, log, seed  # Lightning sets a callback's `log`
        self.warm_up = warm_up
        self.reached_target = False
        self.block_start_samples = 0
        self.block_start_time = self.eval_start_time = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.mlperf_log.describe(submission_values(self.settings))
        self.mlperf_log.describe(built_values(trainer, pl_module, self.settings))
        self.mlperf_log.describe({constants.SEED: self.seed})
        self.mlperf_log.tracked({"warmup_time": self.warm_up.seconds}, 0)
        torch.distributed.barrier()
        self.mlperf_log.init_stop()
        self.mlperf_log.run_start()
        self._start_block(0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == 2:
            refuse_untrained(trainer.strategy.megatron_parallel)
        if step % self.settings.performance.log_every_steps == 0:
            # A read waits for the GPU, so the steps between have none: the host enqueues the next one meanwhile. What was
            # not finite there still is not: it is in the weights.
            loss = float(trainer.callback_metrics["reduced_train_loss"])
            self._refuse_non_finite("train loss", loss, step)
            self.mlperf_log.train_loss(loss, trainer.optimizers[0].param_groups[0]["lr"], self._samples(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        samples = self._samples(trainer)
        self._stop_block(samples)
        self.mlperf_log.eval_start(samples)
        self.eval_start_time = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        samples = self._samples(trainer)
        loss = float(trainer.callback_metrics["val_loss"])
        self._refuse_non_finite("evaluation loss", loss, trainer.global_step)
        self.mlperf_log.eval_accuracy(loss, samples)
        self.mlperf_log.tracked({"validation_time": time.monotonic() - self.eval_start_time}, samples)
        self.mlperf_log.eval_stop(samples)
        self.reached_target = self.settings.evaluation.reached(loss)
        if not self.reached_target and trainer.global_step < self.settings.optimization.max_steps:
            self._start_block(samples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.reached_target:
            self.mlperf_log.run_stop(True, self._samples(trainer))
        else:
            self.mlperf_log.abort(self._samples(trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.mlperf_log.abort(self._samples(trainer))

    def _samples(self, trainer: pl.Trainer) -> int:
        return trainer.global_step * self.settings.global_batch_size

    def _start_block(self, samples: int) -> None:
        self.block_start_samples, self.block_start_time = samples, time.monotonic()
        self.mlperf_log.block_start(samples)

    def _stop_block(self, samples: int) -> None:
        torch.cuda.synchronize()  # the steps are enqueued; the block ends when they have run
        seconds = time.monotonic() - self.block_start_time
        sequences = samples - self.block_start_samples
        steps = sequences / self.settings.global_batch_size
        self.mlperf_log.tracked({"throughput": sequences / seconds, "train_step_time": seconds / steps}, samples)
        self.mlperf_log.block_stop(self.block_start_samples)

    def _refuse_non_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            # Megatron 0.15.3 casts SwiGLU's input to e4m3 (fused_bias_swiglu.py): torch 2.9 without saturation, 2.13 with
            hint = (
                "; before torch 2.13 FP8_ACT=1 makes NaN of any SwiGLU input above 464: try FP8_ACT=0"
                if self.settings.precision.fp8_swiglu
                else ""
            )
            raise NonFiniteLoss(f"{what} is {value} at step {step} on rank {self.settings.system.rank}: the run ends{hint}")


class NoGradient(RuntimeError):
    """An adapter that the backward pass does not reach: the run would evaluate the base model until MAX_STEPS."""


def refuse_untrained(model: torch.nn.Module) -> None:
    """Raise NoGradient where some B got none in the last step. A may have none yet: B starts at zero.

    Not after the first step: FP8's delayed scaling starts with a scale of 1, at which all of a layer's gradients below 2**-17
    are zero in E5M2, and learns a better one in it.
    """
    weights = [(name, weight) for name, weight in adapter_weights(model) if name.endswith("linear_out.weight")]
    if not weights:
        return
    largest = torch.stack([weight.main_grad.abs().amax() for _, weight in weights]).tolist()
    unreached = [name for (name, _), gradient in zip(weights, largest, strict=True) if gradient == 0]
    if unreached:
        raise NoGradient(f"{len(unreached)} of {len(weights)} adapters get no gradient, the first of them {unreached[0]}")
