"""Several training runs in one set of processes, since importing NeMo costs more than a run on the tiny model.

    torchrun --nproc-per-node=2 tests/helpers/many_runs.py FOLDER ENVIRONMENTS.json

Every run leaves FOLDER/NAME/rankR.npz: the adapter's gradients after each step, clipped as the optimizer saw them, whole
on rank 0 (under pipeline parallelism each rank's own layers elsewhere).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from helpers import ROOT
from helpers.training_runs import Tiny, clean_environment, free_port, train_here, values

UNSET = {"TP": "1", "PP": "1", "CP": "1", "SP": "0"}


@dataclass(frozen=True)
class Done:
    """A finished run: its log, and where the gradients of its ranks lie."""

    log: str
    folder: Path

    def losses(self) -> dict[str, list[float]]:
        return {key: values(self.log, key) for key in ("train_loss", "eval_accuracy")}

    def gradients(self, rank: int) -> dict[str, np.ndarray]:
        """Name -> [steps, elements]."""
        with np.load(self.folder / f"rank{rank}.npz") as arrays:
            return dict(arrays)


def run_many(
    tiny: Tiny, results: Path, runs: dict[str, dict[str, str]], ranks: int, script: str = __file__, **common: str
) -> dict[str, Done]:
    """Train once per run's settings on `ranks` processes; `common` are settings of all of them. `script` calls `worker`."""
    environments = {}
    names = {name for run in runs.values() for name in run}
    for name, changes in runs.items():
        (results / name).mkdir(parents=True)
        environment = tiny.environment(results / name, DGXNGPU=str(ranks), **(common | changes))
        environments[name] = dict.fromkeys(names, "") | UNSET | environment  # a run must not see what another one set
    file = results / "environments.json"
    file.write_text(json.dumps(environments))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*torchrun, script, results, file],
        env=clean_environment(PYTHONPATH=f"{ROOT}/src:{ROOT}/tests"),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, first_traceback(done.stderr)
    logs = dict(part.split("\n", 1) for part in done.stdout.split("run ")[1:])
    return {name: Done(logs[name], results / name) for name in runs}


def first_traceback(errors: str) -> str:
    """Of the rank that failed first; the others' and torchrun's own follow from it."""
    whole = re.sub(r"^(\[rank\d+\]: )+", "", errors, flags=re.M)
    found = re.search(r"^Traceback.*?\n\S.*?$", whole, flags=re.M | re.S)
    return found[0][-4000:] if found else errors[-4000:]


def worker(folder: Path, environments: dict[str, dict[str, str]]) -> None:
    """Train once per environment; a line before each run says which."""
    rank = int(os.environ["RANK"])
    for name, environment in environments.items():
        if rank == 0:
            print(f"run {name}", flush=True)
        steps: list[dict[str, np.ndarray]] = []
        with recorded_gradients(steps):
            train_here(environment | {"MASTER_PORT": agreed_port(folder / name / "port", rank)})
        np.savez(folder / name / f"rank{rank}.npz", **{key: np.stack([step[key] for step in steps]) for key in steps[0]})


def agreed_port(file: Path, rank: int) -> str:
    """A port that was free a moment ago, from rank 0: one chosen before all runs may be taken when the last one starts."""
    if rank == 0:
        file.with_suffix(".new").write_text(free_port())
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.05)
    return file.read_text()


def recorded_gradients(steps: list[dict[str, np.ndarray]]):
    """Context: `steps` gets every step's gradients when the log's callback hears of the step."""
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():  # Transformer Engine before Megatron
        from llama2_lora.training.callback import MLPerfCallback

    original = MLPerfCallback.on_train_batch_end

    def record(self, trainer, *arguments) -> None:
        steps.append(whole_gradients(trainer.strategy.megatron_parallel))
        original(self, trainer, *arguments)

    return patch.object(MLPerfCallback, "on_train_batch_end", record)


def whole_gradients(model) -> dict[str, np.ndarray]:
    """Name -> elements of every adapter matrix of all stages, put together from the parts of all ranks, which all call it."""
    import torch
    from megatron.core import parallel_state

    from llama2_lora.training.adapter import _tp_dimension, adapter_weights

    def gathered(part: torch.Tensor, group: torch.distributed.ProcessGroup, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim)

    for chunk in model:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            # The distributed optimizer: each rank has the sum over replicas of its own part, and reads no other
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            bucket.grad_data.copy_(gathered(bucket.grad_data.chunk(group.size())[group.rank()].clone(), group, 0))
    mine = {}
    for name, weight in adapter_weights(model):
        gradient, dim = weight.main_grad.detach(), _tp_dimension(weight)
        if dim is not None:
            gradient = gathered(gradient, parallel_state.get_tensor_model_parallel_group(), dim)
        mine[name] = gradient.flatten().numpy().copy()
    stages: list[dict] = [{} for _ in range(parallel_state.get_pipeline_model_parallel_world_size())]
    torch.distributed.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: gradient for stage in stages for name, gradient in stage.items()}


if __name__ == "__main__":
    worker(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
