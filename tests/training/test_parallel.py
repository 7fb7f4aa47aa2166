"""The same numbers under every layout: 20 steps of training and four evaluations agree with the one-rank run to 1e-5.

A launched copy of this file runs train.py's `train` once per layout, in one set of processes: importing NeMo costs more than
the runs. What is compared is what the runs logged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.training_runs import Tiny, clean_environment, free_port, train_here, values

TOLERANCE = 1e-5
STEPS = 20
ONE_RANK = {"one": {"MINIBS": "8"}}
TWO_RANKS = {
    "dp2": {"MINIBS": "4"},
    "tp2": {"MINIBS": "8", "TP": "2"},
    "pp2": {"MINIBS": "8", "PP": "2"},
    "cp2": {"MINIBS": "8", "CP": "2"},
    "tp2_sp": {"MINIBS": "8", "TP": "2", "SP": "1"},
}
FOUR_RANKS = {
    "tp2_sp_cp2": {"MINIBS": "8", "TP": "2", "SP": "1", "CP": "2"},
    "pp2_cp2": {"MINIBS": "8", "PP": "2", "CP": "2"},
    "tp2_sp_dp2": {"MINIBS": "4", "TP": "2", "SP": "1"},
}


def worker(environments: dict[str, dict[str, str]]) -> None:
    """Train once per environment; a line before each run says which."""
    for name, environment in environments.items():
        if os.environ["RANK"] == "0":
            print(f"layout {name}", flush=True)
        train_here(environment)


def run_layouts(tiny: Tiny, results: Path, layouts: dict[str, dict[str, str]], ranks: int) -> dict[str, str]:
    """Run the worker on `ranks` processes; return each layout's log."""
    short = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "40", "DGXNGPU": str(ranks)}
    environments = {
        name: tiny.environment(results, **(short | layout)) | {"MASTER_PORT": free_port()} for name, layout in layouts.items()
    }
    unset = {"TP": "1", "PP": "1", "CP": "1", "SP": "0"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*torchrun, __file__, json.dumps({name: unset | environment for name, environment in environments.items()})],
        env=clean_environment(PYTHONPATH=f"{ROOT}/src:{ROOT}/tests"),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = done.stdout.split("layout ")[1:]
    return {run.split("\n", 1)[0]: run for run in runs}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def one_rank(tiny: Tiny, results: Path) -> str:
    return run_layouts(tiny, results, ONE_RANK, 1)["one"]


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, results: Path) -> dict[str, str]:
    return run_layouts(tiny, results, TWO_RANKS, 2)


@pytest.fixture(scope="module")
def four_ranks(tiny: Tiny, results: Path) -> dict[str, str]:
    return run_layouts(tiny, results, FOUR_RANKS, 4)


def assert_same(log: str, expected: str) -> None:
    assert values(log, "train_loss") == pytest.approx(values(expected, "train_loss"), abs=TOLERANCE)
    assert values(log, "eval_accuracy") == pytest.approx(values(expected, "eval_accuracy"), abs=TOLERANCE)


def test_one_rank_learns(one_rank: str) -> None:
    """Without this the comparisons could compare runs that do nothing."""
    train, evaluation = values(one_rank, "train_loss"), values(one_rank, "eval_accuracy")
    assert len(train) == STEPS
    assert len(set(train)) == STEPS
    assert len(evaluation) == 4
    assert evaluation[-1] < evaluation[0] - 0.1


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_train_as_one(layout: str, two_ranks: dict[str, str], one_rank: str) -> None:
    assert_same(two_ranks[layout], one_rank)


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_train_as_one(layout: str, four_ranks: dict[str, str], one_rank: str) -> None:
    assert_same(four_ranks[layout], one_rank)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
