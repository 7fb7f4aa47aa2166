"""What a run logs is what was built, and no row of the data set is read before run_start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from helpers.environments import VALID
from helpers.training_runs import TRAIN_ROWS, VALIDATION_ROWS, Tiny, clean_environment, events, free_port, train_here, values
from llama2_lora.config.settings import Settings

LAUNCH = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
}


def worker(environment: dict[str, str]) -> None:
    """Train with data files that cannot be opened until the log has a run_start."""
    from llama2_lora.mlperf_log import MLPerfLog

    log = MLPerfLog(rank=0)

    def refuse_early(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(("train.npy", "validation.npy")):
            if not log.running:
                raise PermissionError(f"{arguments[0]} was opened before run_start")
            print("opened", Path(str(arguments[0])).name, flush=True)

    sys.addaudithook(refuse_early)
    train_here(environment, log)


@pytest.fixture(scope="module")
def log(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    changes = {"WARMUP_TRAIN_STEPS": "1", "WARMUP_VALIDATION_STEPS": "1", "MASTER_PORT": free_port(), "SEED": ""}
    changes |= {"LR_WARMUP_RATIO": "0.5", "EVAL_SKIP": "1", "MAX_STEPS": "6", "MINIBS": "16"}
    environment = tiny.environment(tmp_path_factory.mktemp("results"), **changes)
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(environment)],
        env=clean_environment(PYTHONPATH=f"{ROOT}/src:{ROOT}/tests", **LAUNCH),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_no_data_file_is_opened_before_run_start(log: str) -> None:
    """The audit hook would have ended the run; the lines show that it saw both files."""
    lines = log.splitlines()
    start = next(number for number, line in enumerate(lines) if '"run_start"' in line)
    assert not [line for line in lines[:start] if line.startswith("opened")]
    assert {"opened train.npy", "opened validation.npy"} <= set(lines[start:])


def test_keys_have_the_built_values(log: str) -> None:
    logged = {event["key"]: event["value"] for event in events(log)}
    expected = {
        "submission_benchmark": "llama2_70b_lora",
        "global_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "micro_batch_size": 2,
        "train_samples": TRAIN_ROWS,
        "eval_samples": VALIDATION_ROWS,
        "opt_base_learning_rate": 0.01,
        "opt_learning_rate_training_steps": 6,
        "opt_learning_rate_warmup_factor": 0.5,
        "opt_adamw_weight_decay": 1e-4,
        "opt_gradient_clip_norm": 0.3,
        "lora_rank": 16,
        "lora_alpha": 32,
        "target_accuracy": 0.925,
        "tensor_parallelism": 1,
        "pipeline_parallelism": 1,
        "context_parallelism": 1,
        "expert_parallelism": 1,
        "config_filename": "config_TEST_1x1x16.sh",
        "lowest_numerical_precision_in_linear": "fp32",
        "lowest_numerical_precision_in_attn": "fp32",
        "lowest_numerical_precision_in_comm": "fp32",
    }
    assert {key: logged[key] for key in expected} == expected
    assert 0 <= logged["seed"] < 2**31


def test_evaluations_come_when_the_rule_says(log: str) -> None:
    """GBS 16, cadence 16 sequences, one evaluation left out: after steps 2, 3, 4, 5 and 6."""
    samples = [event["metadata"]["samples_count"] for event in events(log, "eval_accuracy")]
    assert samples == [32, 48, 64, 80, 96]
    stop = events(log, "run_stop")[0]["metadata"]
    assert (stop["status"], stop["samples_count"]) == ("aborted", 96)


def test_curves_are_tracked(log: str) -> None:
    stats = {key for value in values(log, "tracked_stats") for key in value}
    assert {"throughput", "train_step_time", "validation_time", "warmup_time"} <= stats
    rates = [event["metadata"]["lr"] for event in events(log, "train_loss")]
    assert len(rates) == 6
    assert rates[-1] == 0
    assert max(rates) == pytest.approx(0.01)


@pytest.mark.parametrize(("loss", "reached"), [(0.9249, True), (0.925, True), (0.9251, False), (float("nan"), False)])
def test_the_target_itself_is_reached(loss: float, reached: bool) -> None:
    """Rules §9.4: at most 0.925."""
    assert Settings.from_env(VALID).evaluation.reached(loss) is reached


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
