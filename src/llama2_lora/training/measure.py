"""One rank of a config on one device: the real model, adapter and optimizer, in a world that is pretended.

    pretended()   the config, with a world of the config's size of which this process is rank 0, and without files
    Session       one measurement, from the question to what is said of it
    fit()         what train.py builds and starts; weights are made in place
    Passes        warm-up, K steps, an evaluation, and again with half the layers; then what they kept and which kernels ran

The process group is torch's fake one: it has the config's full size and every collective returns at once, with this rank's
own values in the place of the others'. So times are without communication, and losses mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama2_lora.config.settings import Settings
from llama2_lora.findings import Finding
from llama2_lora.forecast.measured import NOT_FINITE, Kernel, Measured, MeasuredMemory, Pass, deciding, write
from llama2_lora.forecast.memory import GB, Memory, memory_per_gpu, what_would_fit
from llama2_lora.gpus import ACCELERATORS, MIB, Accelerator, accelerator_of
from llama2_lora.judge.run import MODEL_TFLOP_PER_SEQUENCE
from llama2_lora.llama2 import LLAMA2_70B, LlamaShape
from llama2_lora.rehearsal import base_model
from llama2_lora.rehearsal.data import VOCABULARY
from llama2_lora.training import recipe
from llama2_lora.training.data import GovReport, synthetic_batches
from llama2_lora.training.measure_device import Device
from llama2_lora.training.measure_memory import kept_for_backward, memory_items
from llama2_lora.training.run import no_garbage_collection, quiet_libraries, unset_attention_choices
from llama2_lora.training.warmup import _train_step, _validation_step, warm_up

SEED = 1
NO_DATA = "/nonexistent"  # a data set's counts are the benchmark's where there is no manifest; its rows are never read
WARMUP_STEPS = 2  # at least: the first step compiles, allocates and makes FP8 transposes
WEIGHT_STD = 0.02  # of frozen FP8 weights: about what Llama-2's are
KERNELS = 40  # that a report keeps


def pretended(settings: Settings, steps: int) -> Settings:
    """The config as one rank of it can run alone: its world as so many nodes of one GPU, no data, no userbuffers.

    Userbuffers are memory that the GPUs of a node map from each other: alone, there is nothing to map.
    """
    system, performance = settings.system, settings.performance
    return replace(
        settings,
        system=replace(system, nodes=system.nodes * system.gpus_per_node, gpus_per_node=1),
        run=replace(settings.run, data_path=NO_DATA, save_adapter=False),
        optimization=replace(settings.optimization, max_steps=max(steps, settings.optimization.max_steps)),
        performance=replace(
            performance,
            tp_comm_overlap=False,
            warmup_train_steps=max(WARMUP_STEPS, performance.warmup_train_steps),
            warmup_validation_steps=max(1, performance.warmup_validation_steps),
        ),
    )


class Session:
    """One measurement: what it was asked, what it found so far, and what is to be said of it.

    ValueError: the rank cannot be measured on this device, in one line.
    """

    def __init__(self, settings: Settings, device: Device, layers: int | None, steps: int, output: Path) -> None:
        self.settings, self.device, self.steps, self.output = pretended(settings, steps), device, steps, output
        whole = model_shape(settings)
        stage = whole.layers // settings.parallel.pp
        if layers is not None and layers > stage:
            raise ValueError(f"--layers {layers}: a rank of this config has {stage}")
        self.layers = layers or stage
        self.shape = replace(whole, layers=self.layers * settings.parallel.pp)
        self.part = accelerator_of(settings.system.accelerator, settings.system.name)
        self.findings = list(self._about_device())
        self.account = self._account(whole)
        self._refuse_what_cannot_fit()
        self.found = Measured(
            settings.system.name, device.name, device.accelerator, whole.layers, stage, deciding(settings), software(device)
        )

    def run(self) -> None:
        """Raises ValueError where the GPU's memory does not suffice."""
        try:
            fit(self.settings, self.shape, Passes(self.settings, self.steps, self.found, self.save))
        except torch.OutOfMemoryError:
            raise ValueError(f"out of memory on {self.device.name}: {self._room()}") from None
        if not self.found.finite:
            self.findings.append(Finding("warning", "measured", NOT_FINITE))

    def save(self) -> None:
        write(self.found, self.output)

    def rates(self) -> list[tuple[str, str]]:
        """Tokens and model FLOP of the whole model per second and GPU."""
        batch, gpus = self.settings.batch, self.settings.parallel.model_parallel_size
        if not self.found.passes[0].step_seconds:
            return []
        sequences = batch.minibs / self.found.step_seconds / gpus
        rows = [("throughput", f"{sequences * batch.sequence_length:,.0f} tokens/s a GPU, without communication")]
        part = ACCELERATORS.get(self.device.accelerator)
        if part and not self.settings.rehearsal:
            utilization = sequences * MODEL_TFLOP_PER_SEQUENCE / part.bf16_tflops
            rows.append(
                ("model FLOP utilization", f"{utilization:.1%} of {part.name}'s dense bf16 peak, without communication")
            )
        return rows

    def _about_device(self) -> Iterator[Finding]:
        if self.device.capacity and self.part and self.device.accelerator != self.part.name:
            text = f"the config names {self.part.name}, this is {self.device.name}: measured as it is, nothing is scaled"
            yield Finding("warning", "measured", text)

    def _account(self, whole: LlamaShape) -> Memory | None:
        """Preflight's, of the rank as it is measured, for this device's memory."""
        if not self.device.capacity:
            return None
        return memory_per_gpu(self.settings, whole, self._as_part())

    def _as_part(self) -> Accelerator:
        part = ACCELERATORS.get(self.device.accelerator) or self.part or ACCELERATORS["H100"]
        return replace(part, memory_mib=self.device.capacity // MIB)

    def _refuse_what_cannot_fit(self) -> None:
        if self.account is None:
            return
        memory = memory_per_gpu(self.settings, self.shape, self._as_part())
        if memory.verdict == "no":
            raise ValueError(f"does not fit {self.device.name}: {self._room(memory)}")

    def _room(self, memory: Memory | None = None) -> str:
        memory = memory or memory_per_gpu(self.settings, self.shape, self._as_part())
        need = f"one rank needs about {memory.total / GB:.1f} GB, there are {memory.capacity / GB:.1f}"
        fix = what_would_fit(self.settings, self.shape, self._as_part())
        fewer = next((n for n in range(self.layers - 1, 1, -1) if self._fits(n)), None)
        ways = [fix and f"{fix} makes room", fewer and f"--layers {fewer} measures a part of it"]
        return "; ".join([need, *filter(None, ways)])

    def _fits(self, layers: int) -> bool:
        shape = replace(self.shape, layers=layers * self.settings.parallel.pp)
        return memory_per_gpu(self.settings, shape, self._as_part()).verdict in ("fits", "tight")


def model_shape(settings: Settings) -> LlamaShape:
    """Llama-2-70B; of a rehearsal's config, its small model."""
    if not settings.rehearsal:
        return LLAMA2_70B
    names = {"vocab_size": VOCABULARY, "max_position_embeddings": settings.batch.sequence_length}
    return LlamaShape.from_hf_config({"model_type": "llama", **base_model.SHAPE, **names})


def software(device: Device) -> dict[str, str]:
    found = {"cuda": device.cuda} if device.cuda else {}
    for package in ("torch", "transformer_engine", "megatron-core", "nemo_toolkit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def fit(settings: Settings, shape: LlamaShape, passes: Passes) -> None:
    """Build what train.py builds, without a checkpoint. The environment must name rank 0 of the config's world."""
    quiet_libraries()
    unset_attention_choices()
    strategy = recipe.build_strategy(settings, SEED, FakeStore())
    strategy._process_group_backend = "fake"
    strategy.restore_config = None
    data = GovReport(settings, SEED, shape.vocab)
    lora = recipe.build_lora(settings, SEED)
    model = recipe.build_model(settings, shape, lora, recipe.build_optimizer(settings), data.validation_rows)
    trainer = recipe.build_trainer(settings, strategy, [lora, passes])
    with no_garbage_collection():
        trainer.fit(model, data)


class Passes(pl.Callback):
    """Measures when the adapter and the optimizer are there, then ends the fit before its first batch."""

    def __init__(self, settings: Settings, steps: int, found: Measured, save: Callable[[], None]) -> None:
        self.settings, self.steps, self.found, self.save = settings, steps, found, save

    def __deepcopy__(self, memo: dict) -> Passes:
        return self  # NeMo records its callbacks' arguments by copying them

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True
        fill_fp8_weights(trainer.strategy.megatron_parallel)
        started = time.perf_counter()
        warm_up(trainer, self.settings)
        self.found.warmup_seconds = time.perf_counter() - started
        block = next(m for m in trainer.strategy.megatron_parallel.modules() if isinstance(m, TransformerBlock))
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


@contextmanager
def first_layers(block: TransformerBlock, count: int) -> Iterator[None]:
    """The block without its later layers."""
    layers, whole = block.layers, block.num_layers_per_pipeline_rank
    block.layers, block.num_layers_per_pipeline_rank = layers[:count], count
    try:
        yield
    finally:
        block.layers, block.num_layers_per_pipeline_rank = layers, whole


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
