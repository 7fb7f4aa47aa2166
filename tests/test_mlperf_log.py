"""Legal order, rank 0 only, and a log that the official checker accepts or refuses as it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.environments import VALID
from helpers.run_text import VALUES
from helpers.training_runs import clean_environment, events, values
from llama2_lora.config import rules
from llama2_lora.config.settings import Settings
from llama2_lora.mlperf_log import MLPerfLog, submission_values

# What a run says of itself besides submission_values
DESCRIPTION = {"seed": 1} | {key: value for key, value in VALUES.items() if not key.startswith("submission_")}


def started(log: MLPerfLog) -> MLPerfLog:
    log.cache_clear()
    log.init_start()
    log.describe(submission_values(Settings.from_env(VALID)))
    log.describe(DESCRIPTION)
    log.init_stop()
    log.run_start()
    return log


def whole_run(log: MLPerfLog, loss: float) -> None:
    started(log)
    log.block_start(0)
    log.train_loss(1.3, 3.9e-4, 80)
    log.tracked({"throughput": 2.1, "train_step_time": 3.8}, 1536)
    log.block_stop(0)
    log.eval_start(1536)
    log.eval_accuracy(loss, 1536)
    log.eval_stop(1536)
    log.run_stop(loss <= rules.TARGET_LOSS, 1536)


def check(ruleset: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", ruleset]
    return subprocess.run([*command, "--log_output", os.devnull, path], capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")  # mllog's handler keeps the stdout of the first test: read the records instead


@pytest.mark.parametrize("ruleset", rules.RULESETS)
def test_a_run_passes_the_official_checker(ruleset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole_run(MLPerfLog(rank=0), 0.92)
    path = tmp_path / "run.log"
    path.write_text("\n".join(caplog.messages))
    done = check(ruleset, path)
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text(path.read_text().replace('"lora_rank", "value": 16', '"lora_rank", "value": 8'))
    assert check(ruleset, path).returncode != 0


def test_only_rank_0_writes(caplog: pytest.LogCaptureFixture) -> None:
    whole_run(MLPerfLog(rank=1), 0.92)
    assert "\n".join(caplog.messages) == ""


def test_illegal_orders_raise() -> None:
    log = MLPerfLog(rank=1)
    with pytest.raises(RuntimeError, match="init_stop in state 'new': legal in init only"):
        log.init_stop()
    log.init_start()
    with pytest.raises(RuntimeError, match="cache_clear"):
        log.cache_clear()
    log = started(MLPerfLog(rank=1))
    for illegal in (lambda: log.eval_stop(0), lambda: log.block_stop(0), lambda: log.init_start(), lambda: log.describe({})):
        with pytest.raises(RuntimeError, match="legal in"):
            illegal()
    log.block_start(0)
    with pytest.raises(RuntimeError, match="eval_start in state 'block'"):
        log.eval_start(8)


def test_abort_closes_what_is_open(caplog: pytest.LogCaptureFixture) -> None:
    log = started(MLPerfLog(rank=0))
    log.block_start(1536)
    log.abort(1600)
    log.abort(1600)  # a second cause of the same end
    text = "\n".join(caplog.messages)
    assert [event["key"] for event in events(text)][-2:] == ["block_stop", "run_stop"]
    stop = events(text, "run_stop")[0]["metadata"]
    assert stop["status"] == "aborted"
    assert stop["samples_count"] == 1600
    assert events(text, "block_stop")[0]["metadata"]["samples_count"] == 1536


def test_abort_during_an_evaluation_logs_no_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    log = started(MLPerfLog(rank=0))
    log.eval_start(1536)
    log.abort(1536)
    text = "\n".join(caplog.messages)
    assert [event["key"] for event in events(text)][-2:] == ["eval_stop", "run_stop"]
    assert values(text, "eval_accuracy") == []


def test_abort_before_the_clock_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = MLPerfLog(rank=0)
    log.init_start()
    log.abort(0)
    assert events("\n".join(caplog.messages), "run_stop") == []


def test_a_rehearsal_never_poses_as_a_system() -> None:
    cpu = Settings.from_env(VALID | {"PLATFORM": "cpu", "MLPERF_SYSTEM_NAME": "DGX H100"})
    assert "CPU rehearsal" in submission_values(cpu)["submission_platform"]
    gpu = Settings.from_env(VALID | {"MLPERF_SYSTEM_NAME": "DGX H100", "MLPERF_SUBMITTER": "Someone"})
    assert submission_values(gpu)["submission_platform"] == "DGX H100"
    assert submission_values(gpu)["submission_org"] == "Someone"


def test_the_command_prints_one_cache_clear() -> None:
    command = [sys.executable, "-m", "llama2_lora.mlperf_log"]
    out = subprocess.run(
        command, env=clean_environment(PYTHONPATH=str(ROOT / "src")), capture_output=True, text=True, check=True
    )
    assert [event["key"] for event in events(out.stdout)] == ["cache_clear"]
