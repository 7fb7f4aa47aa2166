"""Synthetic steps before the clock: kernels are compiled and buffers allocated, and the state is as if nothing had run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_block import TransformerBlock

from llama2_lora.config import schedule
from llama2_lora.config.settings import Settings
from llama2_lora.training.data import Sampler, synthetic_batches
from llama2_lora.training.graphs import without_graphs
from llama2_lora.training.healing import switched_for_now
from llama2_lora.training.shared_callback import SharedCallback


class WarmUp(SharedCallback):
    """The warm-up before the first step; `seconds` is what it took. Add it after LoRA's callback, before the log's."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.seconds = settings, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        started = time.monotonic()
        warm_up(trainer, self.settings)
        self.seconds = time.monotonic() - started


def warm_up(trainer: pl.Trainer, settings: Settings) -> None:
    """WARMUP_TRAIN_STEPS optimizer steps and WARMUP_VALIDATION_STEPS forward passes on random tokens; with FP4_HEAL_STEP as
    many again as they run after the switch."""
    model, p = trainer.strategy.megatron_parallel, settings.precision
    with preserved_state(trainer):
        _steps(trainer, settings)
        # Transformer Engine's offloading counts all layers: with some of them, the backward pass asks for what never left (2.9)
        if p.fp4_heal_step is not None and not settings.performance.offload_layers:
            # Without graphs: those of the first phase stay, those of the second hold all layers and are made in its first steps
            with (
                first_layers(block_of(model), schedule.HEALED_LAYERS),
                without_graphs(model),
                switched_for_now(model, p.fp8_format),
            ):
                _steps(trainer, settings)


def _steps(trainer: pl.Trainer, settings: Settings) -> None:
    performance, batch = settings.performance, settings.batch
    vocab_size = trainer.datamodule.vocab_size
    for _ in range(performance.warmup_train_steps):
        _train_step(trainer, synthetic_batches(settings, vocab_size, batch.micro))
    # A graph of an evaluation is one of all its batches, and is made here.
    whole = performance.graphs == "iteration"
    with nullcontext() if whole else _single_batch_evaluation(trainer.datamodule.data_sampler):
        for _ in range(performance.warmup_validation_steps):
            _validation_step(trainer, synthetic_batches(settings, vocab_size, batch.validation_micro))


def block_of(model: torch.nn.Module) -> TransformerBlock:
    """This rank's layers."""
    return next(module for module in model.modules() if isinstance(module, TransformerBlock))


@contextmanager
def first_layers(block: TransformerBlock, count: int) -> Iterator[None]:
    """The block without its later layers."""
    layers, whole = block.layers, block.num_layers_per_pipeline_rank
    block.layers, block.num_layers_per_pipeline_rank = layers[:count], min(count, whole)
    try:
        yield
    finally:
        block.layers, block.num_layers_per_pipeline_rank = layers, whole


@contextmanager
def preserved_state(trainer: pl.Trainer) -> Iterator[None]:
    """Whatever training changes inside the block is, bit for bit, what it was when the block ends."""
    model = trainer.strategy.megatron_parallel
    optimizers = [inner for outer in trainer.optimizers for inner in _torch_optimizers(outer)]
    generators = _generator_states()
    parameters = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    optimizer_states = [_optimizer_state(optimizer) for optimizer in optimizers]
    fp8_states = _fp8_tensors(model)
    fp8_values = {key: tensor.clone() for key, tensor in fp8_states.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in parameters:
                parameter.copy_(value)
            for optimizer, state in zip(optimizers, optimizer_states, strict=True):
                _restore_optimizer(optimizer, state)
            for key, tensor in _fp8_tensors(model).items():
                # An amax history that the block brought to life starts at 0, a scale at 1.
                tensor.copy_(fp8_values[key]) if key in fp8_values else tensor.fill_(float(key[-1] == "scale"))
        for chunk in model:
            chunk.zero_grad_buffer()
        _restore_generators(generators)


def _train_step(trainer: pl.Trainer, batches: Iterator[Any]) -> None:
    model = trainer.strategy.megatron_parallel
    for chunk in model:
        chunk.zero_grad_buffer()
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    model.training_step(batches)
    for optimizer in trainer.optimizers:
        optimizer.mcore_optimizer.step()


def _validation_step(trainer: pl.Trainer, batches: Iterator[Any]) -> None:
    model = trainer.strategy.megatron_parallel
    model.eval()
    try:
        with torch.no_grad(), trainer.strategy.evaluation_layout():
            model.validation_step(batches)
    finally:
        model.train()


@contextmanager
def _single_batch_evaluation(sampler: Sampler) -> Iterator[None]:
    whole = sampler.validation_micro_batches
    sampler.validation_micro_batches = 1
    try:
        yield
    finally:
        sampler.validation_micro_batches = whole


def _torch_optimizers(outer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside NeMo's wrapper of Megatron's (chained) distributed optimizer."""
    chained = getattr(outer.mcore_optimizer, "chained_optimizers", [outer.mcore_optimizer])
    return [mcore.optimizer for mcore in chained]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Values of master weights, moments and group entries such as FusedAdam's step."""
    return {
        "parameters": [p.detach().clone() for group in optimizer.param_groups for p in group["params"]],
        "state": {p: {k: _copy(v) for k, v in values.items()} for p, values in optimizer.state.items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, value in zip(parameters, saved["parameters"], strict=True):
        parameter.copy_(value)
    optimizer.state.clear()  # Adam makes its moments at the first step: before it there are none
    optimizer.state.update(saved["state"])
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key in group.keys() - values.keys() - {"params"}:
            del group[key]
        group.update(values)


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _fp8_tensors(model: torch.nn.Module) -> dict[tuple[str, str, str], torch.Tensor]:
    """Amax histories and scales of Transformer Engine's delayed scaling, by (module, direction, name)."""
    tensors = {}
    for name, module in model.named_modules():
        for direction, state in getattr(module, "fp8_meta", {}).items():
            for field in ("amax_history", "scale"):
                if torch.is_tensor(tensor := getattr(state, field, None)):
                    tensors[name, direction, field] = tensor
    return tensors


def _generator_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": {name: _of_generator(state) for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def _of_generator(state: Any) -> Any:
    """Megatron's tracker holds states; Transformer Engine's, for CUDA graphs, generators that go on."""
    return state.get_state() if hasattr(state, "get_state") else state


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    generators = {name: g for name, g in tracker.get_states().items() if hasattr(g, "set_state")}
    for name, generator in generators.items():
        generator.set_state(states["megatron"][name])
    tracker.set_states(states["megatron"] | generators)
