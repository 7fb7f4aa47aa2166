"""The host reads nothing from the device in a training step, except where the loss is logged.

A launched copy of this file trains with every method that brings a tensor's value to the host counted, step by step.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from helpers.training_runs import Tiny, free_port, run_worker, train_here

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")
# Megatron's tracker compares states of the host's own generator (random.py, "CPU RNG state changed"): no device's tensors.
HOST_TENSORS = "megatron/core/tensor_parallel/random.py"
STEPS, LOG_EVERY = 6, 3


def worker(environment: dict[str, str], report: Path) -> None:
    import torch

    from llama2_lora.training.cpu import extension

    extension.load()  # before Megatron is imported
    from llama2_lora.training.callback import MLPerfCallback

    found: dict[int, list[str]] = {}
    step = 0

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: Any, *arguments: Any, **options: Any) -> Any:
            if step:
                callers = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack(limit=8)[:-1]]
                if not any(HOST_TENSORS in caller for caller in callers):
                    found.setdefault(step, []).append(f"{name} from {' '.join(callers[-4:])}")
            return original(self, *arguments, **options)

        return read

    start, end = MLPerfCallback.on_train_batch_start, MLPerfCallback.on_train_batch_end

    def started(self: Any, trainer: Any, *arguments: Any) -> Any:
        nonlocal step
        step = trainer.global_step + 1
        return start(self, trainer, *arguments)

    def ended(self: Any, *arguments: Any) -> Any:
        nonlocal step
        try:
            return end(self, *arguments)
        finally:
            step = 0

    with (
        patch.multiple(torch.Tensor, **{name: counted(name) for name in READS}),
        patch.multiple(MLPerfCallback, on_train_batch_start=started, on_train_batch_end=ended),
    ):
        train_here(environment)
    report.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def reads(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Step -> what was read in it, of a run that sets no more than a small model needs."""
    folder = tmp_path_factory.mktemp("reads")
    short = {"MAX_STEPS": str(STEPS), "LOG_EVERY_STEPS": str(LOG_EVERY), "EVAL_EVERY_SEQUENCES": str(8 * STEPS)}
    environment = tiny.environment(folder, **short) | {"MASTER_PORT": free_port()}
    _, report = run_worker(__file__, environment, folder / "report.json")
    return {int(step): found for step, found in report.items()}


# After the second step the run looks at its gradients, once
@pytest.mark.parametrize("step", [step for step in range(3, STEPS + 1) if step % LOG_EVERY])
def test_a_step_reads_nothing(step: int, reads: dict[int, list[str]]) -> None:
    assert reads.get(step, []) == []


def test_a_logging_step_reads_its_loss(reads: dict[int, list[str]]) -> None:
    """Without this the count could be one of nothing."""
    for step in (LOG_EVERY, 2 * LOG_EVERY):
        assert any("callback.py" in read for read in reads[step])


if __name__ == "__main__":
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "none")
    worker(json.loads(sys.argv[1]), Path(sys.argv[2]))
