"""Warm-up leaves no trace: every state is bit for bit what it was, and a run with it gives the losses of a run without."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from helpers.training_runs import Tiny, free_port, run_worker, train_here, values


def worker(environments: list[dict[str, str]], report: Path) -> None:
    """Train with and without warm-up, in one process; the report says what changed during the warm-up."""
    from llama2_lora.training.cpu import extension

    extension.load()  # before Megatron
    from llama2_lora.training import warmup

    found: dict[str, Any] = {}
    original = warmup.warm_up

    def watched(trainer: Any, settings: Any) -> None:
        before = state(trainer)
        with patch.object(type(trainer.optimizers[0].mcore_optimizer), "step", counted(found)):
            original(trainer, settings)
        after = state(trainer)
        found["changed"] = [name for name in before if before[name] != after[name]]
        found["states"] = sorted(before)

    for environment in environments:
        print("run", flush=True)
        with patch.object(warmup, "warm_up", watched if environment["WARMUP_TRAIN_STEPS"] != "0" else original):
            train_here(environment)
    report.write_text(json.dumps(found))


def counted(found: dict[str, Any]) -> Any:
    """The optimizer's step, counting: a warm-up that never steps would pass every comparison."""
    from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer

    steps = {kind: kind.step for kind in (ChainedOptimizer, DistributedOptimizer)}

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        found["optimizer_steps"] = found.get("optimizer_steps", 0) + 1
        return steps[type(self)](self, *args, **kwargs)

    return step


def state(trainer: Any) -> dict[str, str]:
    """Digests of all that training changes."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    parameters = {name: p.detach() for name, p in trainer.strategy.megatron_parallel.named_parameters()}
    gradients = [buffer.grad_data for chunk in trainer.strategy.megatron_parallel for buffer in chunk.buffers]
    return {
        "parameters": digest(parameters),
        "gradients": digest(gradients),
        "optimizer": digest([o.optimizer.state_dict() for o in trainer.optimizers[0].mcore_optimizer.chained_optimizers]),
        "master weights": digest([g["params"] for g in trainer.optimizers[0].param_groups]),
        "schedule": digest(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        "torch generator": digest(torch.get_rng_state()),
        "numpy generator": digest(np.random.get_state()[1]),
        "python generator": digest(random.getstate()),
        "megatron generators": digest(get_cuda_rng_tracker().get_states()),
        "global step": digest(trainer.global_step),
    }


def digest(value: Any) -> str:
    import hashlib

    import torch

    if isinstance(value, dict):
        text = repr([(repr(key), digest(item)) for key, item in value.items()])
    elif isinstance(value, (list, tuple)):
        text = repr([digest(item) for item in value])
    elif torch.is_tensor(value):
        text = value.detach().numpy().tobytes().hex()
    else:
        text = repr(value.tobytes().hex() if isinstance(value, np.ndarray) else value)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def ran(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """The logs of a run without and one with warm-up, and what the latter's states did."""
    folder = tmp_path_factory.mktemp("warmup")
    environments = [
        tiny.environment(folder, WARMUP_TRAIN_STEPS=steps, WARMUP_VALIDATION_STEPS=steps, MASTER_PORT=free_port())
        for steps in ("0", "2")
    ]
    output, report = run_worker(__file__, environments, folder / "report.json")
    return output.split("run\n")[1:], report


def test_every_state_is_bit_for_bit_what_it_was(ran: tuple[list[str], dict[str, Any]]) -> None:
    report = ran[1]
    assert report["changed"] == []
    assert len(report["states"]) == 10
    assert report["optimizer_steps"] >= 2


def test_losses_are_those_of_a_run_without(ran: tuple[list[str], dict[str, Any]]) -> None:
    without, with_warmup = ran[0]
    assert len(values(without, "train_loss")) == 4
    for key in ("train_loss", "eval_accuracy"):  # dropout is on: generators that had moved would show
        assert values(with_warmup, key) == values(without, key)


if __name__ == "__main__":
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "none")
    worker(json.loads(sys.argv[1]), Path(sys.argv[2]))
