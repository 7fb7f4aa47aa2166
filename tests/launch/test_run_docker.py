"""scripts/run_docker.sh: the same steps and the same judgement on one node, with a stand-in for docker (bin/docker)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from launch.jobs import FIRST_SEED, HERE, ROOT, make_files, make_image, processes_with, run_stops, values


@pytest.fixture
def start(tmp_path):
    """Start scripts/run_docker.sh with a payload; its output goes to tmp_path/out."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)("not root: the stand-in for docker mounts")
    make_files(tmp_path)
    # Pairs, not a dict: with Debian's own Python, base_prefix is /usr too
    site = sysconfig.get_paths()["purelib"]
    mounts = [("/usr", "/usr"), (sys.base_prefix, "/run/l2ltest/python"), (site, "/run/l2ltest/site")]
    make_image(tmp_path / "an image", mounts)

    def run(payload: str, **changes: str) -> subprocess.Popen:
        with open(tmp_path / "an image/etc/environment", "a") as f:
            f.write(f"PAYLOAD={payload}\n")  # docker hands on only what it is told to
        environment = {
            "PATH": f"{HERE}/bin:{os.environ['PATH']}",
            "DOCKER_STATE": str(tmp_path / "docker"),
            "DATADIR": str(tmp_path / "gov report"),
            "MODEL": str(tmp_path / "check point"),
            "LOGDIR": str(tmp_path / "results"),
            "CONT": str(tmp_path / "an image"),
            "SEED": str(FIRST_SEED),
            "MLPERF_SUBMITTER": "job",
        } | changes
        environment = {name: value for name, value in environment.items() if value}
        out = open(tmp_path / "out", "w")  # noqa: SIM115 - the process holds it
        config = tmp_path / "config_CPU_1x2x4.sh"
        config.write_text(f'source "{ROOT}/{config.name}"\nexport NEXP={len(payload.split())}\n')
        command = ["scripts/run_docker.sh", config]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    yield run
    for left in (tmp_path / "docker").glob("*"):  # of a test that failed
        subprocess.run([HERE / "bin/docker", "rm", "--force", left.name], env={"DOCKER_STATE": str(tmp_path / "docker")})


def log(folder: Path, trial: int) -> Path:
    (found,) = (folder / "results").glob(f"*_{trial}.log")
    return found


def wait_for(condition, folder: Path) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, (folder / "out").read_text()
        time.sleep(0.1)


def test_as_the_readme_writes_it(start, tmp_path):
    """The four paths and the config: default commands, the image's python, a random seed."""
    process = start("pass", SEED="", MLPERF_SUBMITTER="")
    assert process.wait(120) == 0, (tmp_path / "out").read_text()
    assert values(log(tmp_path, 1), "cache_clear") == [True]
    assert values(log(tmp_path, 1), "submission_org") == ["unofficial"], "the config's, not the image's"


def test_trials_are_run_and_judged(start, tmp_path):
    status = start("pass missed").wait(120)
    text = (tmp_path / "out").read_text()
    assert status == 1, text
    assert "trial 1 finished with status 0: training passed, compliance passed" in text
    assert "trial 2 finished with status 1: training FAILED (1), compliance FAILED" in text
    assert values(log(tmp_path, 1), "submission_org") == ["job"]
    assert values(log(tmp_path, 1), "cache_clear") == [True]
    assert not list((tmp_path / "docker").iterdir()), "the container is gone"


def test_interruption_closes_the_log_and_ends_the_container(start, tmp_path):
    process = start("hang hang")
    wait_for(lambda: "block_start" in (tmp_path / "out").read_text(), tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 143
    assert run_stops(log(tmp_path, 1)) == ["aborted"]
    assert len(list((tmp_path / "results").glob("*.log"))) == 1
    assert not list((tmp_path / "docker").iterdir())
    assert not processes_with("PAYLOAD=hang hang")


def test_nothing_runs_on_behind_an_aborted_log(start, tmp_path):
    """docker exec passes no signal on, and the container's end may take ten seconds."""
    process = start("hang", DOCKER_SLOW_RM="3")
    wait_for(lambda: "block_start" in (tmp_path / "out").read_text(), tmp_path)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: run_stops(log(tmp_path, 1)), tmp_path)
    assert not processes_with("PAYLOAD=hang")
    assert process.poll() is None, "the container is still there"
    assert process.wait(180) == 143


def test_clocks_are_put_back_after_an_interruption(start, tmp_path):
    (tmp_path / "gpus").mkdir()
    (tmp_path / "gpus/vboost").write_text("2 2\n")
    process = start("hang", VBOOST="1", GPU_STATE=str(tmp_path / "gpus"))
    wait_for(lambda: "block_start" in (tmp_path / "out").read_text(), tmp_path)
    assert (tmp_path / "gpus/vboost").read_text() == "1 1\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 143
    assert (tmp_path / "gpus/vboost").read_text() == "2 2\n"


def test_refused_limits(start, tmp_path):
    assert start("pass", DOCKER_REFUSES_ULIMITS="1").wait(60) == 1
    assert "where a --ulimit is refused: DOCKER_ULIMITS= leaves them out" in (tmp_path / "out").read_text()
    assert start("pass", DOCKER_REFUSES_ULIMITS="1", DOCKER_ULIMITS=" ").wait(60) == 0


def test_a_disk_that_fills(tmp_path):
    """No container, and a log folder of 200 KiB: the log ends in a whole line, and the run did not pass."""
    if os.geteuid() != 0:
        pytest.skip("not root: a small file system is mounted")
    make_files(tmp_path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "${{@/#src\\/train.py/tests/launch/payload.py}}"\n')
    python.chmod(0o755)
    (tmp_path / "results").mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "DATADIR": str(tmp_path / "gov report"),
        "MODEL": str(tmp_path / "check point"),
        "LOGDIR": str(tmp_path / "results"),
        "CONT": "none",
        "PYTHON": str(python),
        "PAYLOAD": "flood",
        "HEALTH": "off",
        "DROP_CACHES_COMMAND": "true",
    }
    run = 'mount -t tmpfs -o size=200k tmpfs "$LOGDIR" && scripts/run_docker.sh config_CPU_1x2x4.sh; cp "$LOGDIR"/*_1.log "$0"'
    command = ["unshare", "--mount", "bash", "-c", f"{run}; exit", tmp_path / "log"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    text = (tmp_path / "log").read_text()
    assert "fills the disk" in text, done.stderr
    assert text.endswith("\n")
    assert run_stops(tmp_path / "log") == ["aborted"] or "run_stop (aborted) could not be written" in done.stderr
    assert "training passed" not in done.stdout


def test_missing_image(start, tmp_path):
    assert start("pass", CONT=str(tmp_path / "nowhere")).wait(60) == 1
    assert "nowhere: the container cannot be made" in (tmp_path / "out").read_text()
