"""One rank of a config on one device: the real model, adapter and optimizer, in a world that is pretended.

    measure_device    the GPU, or why there is none
    pretended()       the config, with a world of the config's size of which this process is rank 0
    Session           one measurement, from the question to what is said of it
    measure_passes    build, warm-up, K steps, an evaluation, and again with half the layers
    measure_memory    bytes by kind                   measure_ring    context parallelism's ring without neighbours

The process group is torch's fake one: it has the config's full size and every collective returns at once, with this rank's
own values in the place of the others'. So times are without communication, and losses mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from llama2_lora.config.settings import Settings
from llama2_lora.findings import Finding
from llama2_lora.forecast.measured import NOT_FINITE, Measured, deciding, write
from llama2_lora.forecast.memory import GB, Memory, memory_per_gpu, what_would_fit
from llama2_lora.gpus import ACCELERATORS, MIB, Accelerator, accelerator_of
from llama2_lora.judge.run import MODEL_TFLOP_PER_SEQUENCE
from llama2_lora.llama2 import LLAMA2_70B, LlamaShape
from llama2_lora.rehearsal import base_model
from llama2_lora.rehearsal.data import VOCABULARY
from llama2_lora.training.measure_device import Device
from llama2_lora.training.measure_passes import Passes, fit

WARMUP_STEPS = 2  # at least: the first step compiles, allocates and makes FP8 transposes


def pretended(settings: Settings, steps: int) -> Settings:
    """The config as one rank of it can run alone: its world as so many nodes of one GPU, no userbuffers.

    Userbuffers are memory that the GPUs of a node map from each other: alone, there is nothing to map.
    """
    system, performance = settings.system, settings.performance
    return replace(
        settings,
        system=replace(system, nodes=system.nodes * system.gpus_per_node, gpus_per_node=1),
        run=replace(settings.run, save_adapter=False),
        optimization=replace(settings.optimization, max_steps=max(steps, settings.optimization.max_steps)),
        performance=replace(
            performance,
            tp_comm_overlap=False,
            graphs="none",  # a replay calls nothing that could be measured by itself
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
        self.findings = list(self._about_device(settings.performance.tp_comm_overlap))
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

    def _about_device(self, overlap: bool) -> Iterator[Finding]:
        if overlap:
            text = "TP_COMM_OVERLAP: userbuffers need the other ranks; measured without them"
            yield Finding("note", "measured", text)
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
