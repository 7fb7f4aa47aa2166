"""What a measurement runs: train.py's objects without a checkpoint, then a callback that measures and ends the fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.data import WrappedDataLoader
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama2_lora.config import rules
from llama2_lora.config.settings import Settings
from llama2_lora.forecast.measured import Kernel, Measured, MeasuredMemory, Pass
from llama2_lora.llama2 import LlamaShape
from llama2_lora.training import recipe
from llama2_lora.training.data import Sampler, synthetic_batches
from llama2_lora.training.measure_memory import kept_for_backward, memory_items
from llama2_lora.training.measure_ring import echoing_ring
from llama2_lora.training.run import no_garbage_collection, quiet_libraries, unset_attention_choices
from llama2_lora.training.shared_callback import SharedCallback
from llama2_lora.training.warmup import _train_step, _validation_step, block_of, first_layers, warm_up

SEED = 1
WEIGHT_STD = 0.02  # of frozen FP8 weights: about what Llama-2's are
KERNELS = 40  # that a report keeps


def fit(settings: Settings, shape: LlamaShape, passes: Passes) -> None:
    """Build what train.py builds, without a checkpoint. The environment must name rank 0 of the config's world."""
    quiet_libraries()
    unset_attention_choices()
    strategy = recipe.build_strategy(settings, SEED, FakeStore())
    # PRIVATE: lightning 2.4 lightning.pytorch.strategies.DDPStrategy._process_group_backend
    strategy._process_group_backend = "fake"
    strategy.restore_config = None
    data = NoData(settings, shape.vocab)
    lora = recipe.build_lora(settings, SEED)
    model = recipe.build_model(settings, shape, lora, recipe.build_optimizer(settings), data.validation_rows)
    trainer = recipe.build_trainer(settings, strategy, [lora, passes])
    with no_garbage_collection(), echoing_ring():
        trainer.fit(model, data)


class NoData(pl.LightningDataModule):
    """What a fit and the warm-up ask of the data, with the benchmark's counts; the one row is never read."""

    def __init__(self, settings: Settings, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.train_rows, self.validation_rows = rules.TRAIN_SEQUENCES, rules.EVAL_SEQUENCES
        batches = -(-self.validation_rows // (settings.validation_data_parallel_size * settings.batch.validation_micro))
        self.data_sampler = Sampler(settings, batches)

    def train_dataloader(self) -> WrappedDataLoader:
        return WrappedDataLoader(mode="train", dataset=[{}], batch_sampler=[[0]])

    def val_dataloader(self) -> WrappedDataLoader:
        return WrappedDataLoader(mode="validation", dataset=[{}], batch_sampler=[[0]])


class Passes(SharedCallback):
    """Measures when the adapter and the optimizer are there, then ends the fit before its first batch."""

    def __init__(self, settings: Settings, steps: int, found: Measured, save: Callable[[], None]) -> None:
        self.settings, self.steps, self.found, self.save = settings, steps, found, save

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True
        fill_fp8_weights(trainer.strategy.megatron_parallel)
        started = time.perf_counter()
        warm_up(trainer, self.settings)
        self.found.warmup_seconds = time.perf_counter() - started
        block = block_of(trainer.strategy.megatron_parallel)
        layers = len(block.layers)
        gpu = self.settings.system.platform == "gpu"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        self._time(trainer, layers)
        peak = _peak() if gpu else None
        self._account(trainer, layers, peak)
        self._profile(trainer)
        if layers < self.found.stage_layers:
            with first_layers(block, layers // 2):
                _train_step(trainer, self._batches(trainer))  # the allocator's blocks of another size
                self._time(trainer, layers // 2)
        trained = [p for p in trainer.strategy.megatron_parallel.parameters() if p.requires_grad]
        self.found.finite = all(bool(torch.isfinite(p).all()) for p in trained)
        self.found.complete = True
        self.save()

    def _time(self, trainer: pl.Trainer, layers: int) -> None:
        seconds: list[float] = []
        batches = self._batches(trainer)
        self.found.passes.append(Pass(layers, seconds))
        for _ in range(self.steps):
            seconds.append(_timed(lambda: _train_step(trainer, batches)))
            self.save()
        batches = self._batches(trainer, self.settings.batch.validation_micro)
        evaluation = _timed(lambda: _validation_step(trainer, batches))
        self.found.passes[-1] = Pass(layers, seconds, evaluation)
        self.save()

    def _account(self, trainer: pl.Trainer, layers: int, peak: tuple[int, int, int] | None) -> None:
        with kept_for_backward(trainer.strategy.megatron_parallel) as kept:
            _train_step(trainer, self._batches(trainer))
        allocated, slack, outside = peak or (None, 0, 0)
        self.found.memory = MeasuredMemory(layers, memory_items(trainer, kept), allocated, slack, outside)
        self.save()

    def _profile(self, trainer: pl.Trainer) -> None:
        gpu = self.settings.system.platform == "gpu"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
        with torch.profiler.profile(activities=activities) as profile:
            _train_step(trainer, self._batches(trainer))
            torch.cuda.synchronize()
        own, whole = ("self_device_time_total", "device_time_total") if gpu else ("self_cpu_time_total", "cpu_time_total")
        events = profile.key_averages()
        kernels = [e for e in events if not gpu or e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False)]
        kernels = sorted((e for e in kernels if getattr(e, own) > 0), key=lambda e: -getattr(e, own))
        self.found.kernels = [Kernel(e.key, getattr(e, own) / 1e6, e.count) for e in kernels[:KERNELS]]
        rest = kernels[KERNELS:]
        if rest:
            self.found.kernels.append(
                Kernel(f"{len(rest)} others", sum(getattr(e, own) for e in rest) / 1e6, sum(e.count for e in rest))
            )
        self.found.collective_seconds = sum(getattr(e, whole) for e in events if e.key.startswith("c10d::")) / 1e6
        self.save()

    def _batches(self, trainer: pl.Trainer, rows: int | None = None) -> Iterator[Any]:
        return synthetic_batches(self.settings, trainer.datamodule.vocab_size, rows or self.settings.batch.micro)


def fill_fp8_weights(model: torch.nn.Module) -> None:
    """Values of a checkpoint's size, quantized with the scale that the model prepared for it (model.py).

    Megatron's random start was quantized with a scale of 1, where most of it is subnormal or 0: products of such numbers draw
    less power, and a GPU that is not held back by its power limit is faster than it would be.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if hasattr(weight, "_quantizer"):
                weight.copy_(torch.randn(weight.shape, device="cuda", dtype=torch.bfloat16) * WEIGHT_STD)


def _timed(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak() -> tuple[int, int, int]:
    """Bytes allocated at most, reserved above that, and used outside of torch."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return allocated, reserved - allocated, total - free - torch.cuda.memory_reserved()
