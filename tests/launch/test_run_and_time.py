"""scripts/run_and_time.sh: each launcher's variables become torch.distributed's; DRY_RUN=1 shows them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/run_and_time.sh"
TWO_NODES = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
SLURM = {
    "SLURM_PROCID": "11",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "11",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}


def dry_run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "PLATFORM": "cpu"} | environment
    return subprocess.run([SCRIPT, *arguments], env=environment, cwd="/", capture_output=True, text=True)


def shown(environment: dict[str, str]) -> dict[str, str]:
    done = dry_run(environment)
    assert done.returncode == 0, done.stderr
    return dict(word.split("=", 1) for word in shlex.split(done.stdout, comments=True) if "=" in word)


@pytest.mark.parametrize(
    "launcher",
    [SLURM, TORCHRUN, OPEN_MPI, SLURM | TORCHRUN, SLURM | OPEN_MPI | {"SLURM_PROCID": "1"}, SLURM | {"RANK": "0"}],
    ids=["slurm", "torchrun", "open mpi", "torchrun below slurm", "open mpi below slurm", "slurm with a stray RANK"],
)
def test_rank_11_of_two_nodes_of_eight(launcher):
    expected = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert shown(launcher | TWO_NODES) == expected | TWO_NODES


def test_alone():
    expected = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert shown({}) == expected | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        (SLURM, "MASTER_ADDR is not set"),
        (SLURM | TWO_NODES | {"SLURM_STEP_TASKS_PER_NODE": "8,4"}, "every node must run as many tasks"),
        ({"DRY_RUN": "yes"}, "DRY_RUN=yes: must be 0 or 1"),
        (TWO_NODES | {"RANK": "3"}, "RANK=3 without WORLD_SIZE and LOCAL_RANK"),
    ],
)
def test_what_cannot_work_is_refused(environment, problem):
    done = dry_run(environment)
    assert done.returncode == 2
    assert problem in done.stderr


def test_the_command():
    assert "python -u src/train.py # launcher: none" in dry_run({}).stdout
    done = dry_run({"PYTHON": "/a b/python"}, "scripts/lib/allreduce_bench.py", "--mib", "1")
    assert r"/a\ b/python -u scripts/lib/allreduce_bench.py --mib 1" in done.stdout


@pytest.fixture
def gpu_host(tmp_path):
    """nvidia-smi and taskset that answer as on a host whose GPUs have a sysfs entry; here there is none."""
    for name, text in {"nvidia-smi": "echo 00000000:1B:00.0", "taskset": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLATFORM": "gpu"}


def test_binding_is_left_out_where_the_cores_of_a_gpu_are_not_known(gpu_host):
    assert "taskset" not in dry_run(gpu_host).stdout
    assert dry_run(gpu_host | {"BIND": "none"}).returncode == 0


def test_torch_is_not_told_to_run_code_from_checkpoints():
    environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHON": sys.executable, "BIND": "none"}
    show = "import os; print(os.environ.get('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'unset'))"
    command = [SCRIPT, "-c", show]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "unset\n"
