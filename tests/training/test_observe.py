"""OBSERVE_*: what a watched run leaves, by the real command on two CPU ranks; nvidia-smi and nsys are stand-ins."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.training_runs import Tiny, clean_environment, events, run_training
from llama2_lora.judge import observed
from llama2_lora.judge.observed import StepTimes
from llama2_lora.judge.power import read_power

SMI = """#!/usr/bin/env bash
[[ "$*" == "--query-gpu=index,power.draw,clocks.sm,temperature.gpu --format=csv,noheader,nounits --loop-ms=50" ]] || exit 3
while sleep 0.05; do printf '0, 300.5, 1980, 41\\n1, 299.5, 1965, [N/A]\\n'; done
"""


@pytest.fixture(scope="module")
def path_with_stand_ins(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bin")
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{clean_environment()['PATH']}"


@pytest.fixture(scope="module")
def watched(tiny: Tiny, path_with_stand_ins: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one run with everything that a CPU can watch."""
    results = tmp_path_factory.mktemp("watched")
    watch = {"OBSERVE_PROFILE": "2-3", "OBSERVE_STEP_TIMES": "1", "OBSERVE_POWER": "0.05", "TRIAL_NAME": "job_1"}
    environment = tiny.environment(results, DGXNGPU="2", MINIBS="4", PATH=path_with_stand_ins, **watch)
    done = run_training(environment, ranks=2)
    assert events(done.stdout, "run_stop"), done.stderr[-3000:]
    (results / "job_1.log").write_text(done.stdout)
    return results, done.stdout


def test_the_profilers_trace_is_rank_0s(watched: tuple) -> None:
    folder = watched[0] / "observe_1"
    assert sorted(path.name for path in folder.iterdir()) == ["step_times.json", "trace_0.json.gz"]
    trace = json.loads(gzip.decompress((folder / "trace_0.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_every_rank_has_its_times_and_the_slowest_is_named_after_the_run(watched: tuple) -> None:
    results, out = watched
    times = observed.read(results / "observe_1")
    assert times
    assert [len(steps) for steps in times.seconds] == [4, 4]  # MAX_STEPS
    assert all(second > 0 for steps in times.seconds for second in steps)
    lines = out.splitlines()
    stop = next(i for i, line in enumerate(lines) if '"run_stop"' in line)
    assert lines.index(str(times)) > stop
    assert f"slowest rank {times.slowest} on " in lines[lines.index(str(times))]


def test_power_is_that_of_the_scored_clock(watched: tuple) -> None:
    """300.5 + 299.5 W, from the first step to run_stop; the same reader as for a submission's power logs."""
    results, out = watched
    file = results / "power/job_1/node_0.txt"
    found = events(file.read_text())
    assert [found[0]["key"], found[-1]["key"]] == ["power_measurement_start", "power_measurement_stop"]
    clock = [events(out, key)[0]["time_ms"] for key in ("run_start", "run_stop")]
    assert clock[0] <= found[0]["time_ms"] <= found[1]["time_ms"]
    reading = next(event for event in found if event["key"] == "power_reading")
    assert reading["value"] == 600.0
    assert reading["metadata"] == {"watts": [300.5, 299.5], "sm_mhz": [1980.0, 1965.0], "celsius": [41.0, None]}
    power = read_power([file])[str(results / "job_1")]
    assert power.mean_watts == pytest.approx(600, rel=0.2)
    assert (power.nodes, power.gpus_alone) == (1, True)


def test_summarize_tells_energy_and_the_slowest_rank(watched: tuple) -> None:
    results, _ = watched
    command = [sys.executable, ROOT / "scripts/summarize.py", results, "--json"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=100)
    found = json.loads(done.stdout)
    run = found["results"][0]["runs"][0]
    assert run["energy_kwh"] == pytest.approx(run["mean_kilowatts"] * run["train_minutes"] / 60)
    assert run["mean_kilowatts"] == pytest.approx(0.6, rel=0.2)
    texts = [finding["text"] for finding in found["findings"]]
    assert any("not at the wall" in text for text in texts)
    assert any(text.startswith("slowest rank ") for text in texts)
    page = results / "page.html"
    done = subprocess.run([*command[:-1], "--html", page], env=clean_environment(), capture_output=True, text=True, timeout=100)
    assert '<svg class="chart" viewBox' in page.read_text(), done.stderr
    assert "power over time" in page.read_text()


def test_nobody_is_left_behind(watched: tuple) -> None:
    left = subprocess.run(["pgrep", "-f", str(watched[0])], capture_output=True, text=True)
    assert left.stdout == ""


def test_without_nvidia_smi_there_is_one_line_and_no_file(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "src/llama2_lora/node/power.py", tmp_path / "power/node_0.txt", "1"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: OBSERVE_POWER: [Errno 2] No such file or directory: 'nvidia-smi'\n"
    assert not (tmp_path / "power").exists()


def test_a_sampler_ends_with_its_rank(tmp_path: Path, path_with_stand_ins: str) -> None:
    """The pipe that starts it closes when the rank dies, however it does."""
    command = [sys.executable, ROOT / "src/llama2_lora/node/power.py", tmp_path / "node_0.txt", "0.05"]
    done = subprocess.run(
        command, env={"PATH": path_with_stand_ins}, input="start\n", text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    keys = [event["key"] for event in events((tmp_path / "node_0.txt").read_text())]
    assert (keys[0], keys[-1]) == ("power_measurement_start", "power_measurement_stop")


def test_the_slowest_by_hand() -> None:
    times = StepTimes(["a", "a", "b"], [[1.0, 1.0, 9.0], [1.0, 1.0, 1.0], [1.0, 1.2, 1.2]])
    assert str(times) == "slowest rank 2 on b: 1.2 s a step of its own, 20.0% above the median of 3 ranks"


@pytest.mark.parametrize("text", ["", "{}", '{"hosts": [], "seconds": []}', '{"hosts": ["a"], "seconds": [[]]}'])
def test_damaged_times_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / observed.NAME).write_text(text)
    assert observed.read(tmp_path) is None


# ---- nsys ------------------------------------------------------------------------------------------------------------


def dry_run(tmp_path: Path, with_nsys: bool, **variables: str) -> subprocess.CompletedProcess[str]:
    if with_nsys:
        (tmp_path / "nsys").write_text("#!/bin/sh\n")
        (tmp_path / "nsys").chmod(0o755)
    environment = clean_environment(DRY_RUN="1", BIND="none", **variables)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    return subprocess.run([ROOT / "scripts/run_and_time.sh"], env=environment, capture_output=True, text=True)


RANK_8 = {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"}


def test_nsys_wraps_the_ranks_that_were_chosen(tmp_path: Path) -> None:
    watch = {"OBSERVE_NSYS": "100-104", "RESULTS_PATH": "/results", "TRIAL_NAME": "job_1"}
    done = dry_run(tmp_path, True, **RANK_8, **watch, OBSERVE_RANKS="0,8")
    assert "nsys profile --trace=cuda" in done.stdout
    assert "--capture-range=cudaProfilerApi" in done.stdout
    assert "--output=/results/nsys_job_1_8 " in done.stdout
    assert done.stdout.index("nsys profile") < done.stdout.index("src/train.py")
    assert "nsys" not in dry_run(tmp_path, True, **RANK_8, **watch, OBSERVE_RANKS="0,18").stdout
    assert "nsys" not in dry_run(tmp_path, True, **RANK_8).stdout


def test_no_nsys_is_one_line(tmp_path: Path) -> None:
    done = dry_run(tmp_path, False, **RANK_8, OBSERVE_NSYS="100-104", OBSERVE_RANKS="8")
    assert done.returncode == 2
    assert done.stderr == (
        "run_and_time.sh: error: OBSERVE_NSYS=100-104: nsys is not in this image; OBSERVE_PROFILE needs none\n"
    )
