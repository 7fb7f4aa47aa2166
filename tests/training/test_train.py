"""Runs by the real command that go wrong: one clear error, a non-zero status, a log that is closed, nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.training_runs import SEQUENCE, Tiny, clean_environment, events, run_training

FAST = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def run_alone(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One rank without torchrun."""
    return subprocess.run(
        [ROOT / "scripts/run_and_time.sh"], env=clean_environment(**environment), capture_output=True, text=True, timeout=200
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def copy_of(tiny: Tiny, folder: Path) -> Tiny:
    shutil.copytree(tiny.data, folder / "data")
    shutil.copytree(tiny.checkpoint, folder / "checkpoint")
    return Tiny(tiny.hugging_face, folder / "checkpoint", folder / "data")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("no train.npy", "train.npy does not exist; run scripts/download_dataset.py"),
        ("half a train.npy", "bytes, the manifest says"),
        ("no checkpoint", "is not a folder; run scripts/convert_model.py"),
        ("no tokenizer", "tokenizer"),
        ("another shape", "linear_fc1"),
        ("results are a file", "is not a folder that this user can write to"),
        ("bad setting", "MBS=3: must divide MINIBS=8"),
    ],
)
def test_what_can_be_seen_before_the_start_ends_it(tiny: Tiny, tmp_path: Path, damage: str, expected: str) -> None:
    """Status 2, before torch is imported, and not one line of an MLPerf log."""
    mine = copy_of(tiny, tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    changes = {}
    if damage == "no train.npy":
        (mine.data / "train.npy").unlink()
    elif damage == "half a train.npy":
        os.truncate(mine.data / "train.npy", 2000)
    elif damage == "no checkpoint":
        shutil.rmtree(mine.checkpoint)
    elif damage == "no tokenizer":
        shutil.rmtree(mine.checkpoint / "context/nemo_tokenizer")
    elif damage == "another shape":
        shape = next((mine.checkpoint / "weights").glob("*linear_fc1.weight")) / ".zarray"
        shape.write_text(shape.read_text().replace("96", "192"))
    elif damage == "results are a file":
        results = mine.data / "manifest.json"
    else:
        changes = {"MBS": "3"}
    done = run_alone(mine.environment(results, **changes) | FAST)
    assert done.returncode == 2, done.stderr[-2000:]
    assert expected in done.stderr
    assert len(errors(done)) == 1
    assert "Traceback" not in done.stderr
    assert events(done.stdout) == []


def test_damaged_data_ends_the_run_and_closes_the_log(tiny: Tiny, tmp_path: Path) -> None:
    """The clock runs when the files are opened: the log must still be a whole one."""
    mine = copy_of(tiny, tmp_path)
    content = bytearray((mine.data / "validation.npy").read_bytes())
    content[-2 - SEQUENCE] ^= 1
    (mine.data / "validation.npy").write_bytes(content)
    done = run_alone(mine.environment(tmp_path) | FAST | {"SAVE_ADAPTER": "1"})
    assert done.returncode == 1
    assert "validation.npy has sha256" in errors(done)[0]
    assert len(errors(done)) == 1
    assert events(done.stdout, "train_loss") == []
    assert events(done.stdout, "run_stop")[0]["metadata"]["status"] == "aborted"
    assert not list(tmp_path.glob("adapter*"))


def test_data_that_changes_under_a_run_ends_it(tiny: Tiny, tmp_path: Path) -> None:
    """A mapped file that is cut would end the process with SIGBUS; a replaced one once gave `run_stop success`."""
    mine = copy_of(tiny, tmp_path)
    environment = clean_environment(**mine.environment(tmp_path, MAX_STEPS="100000", TARGET_LOSS="0.01") | FAST)
    command = [ROOT / "scripts/run_and_time.sh"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if '"train_loss"' in line:
                break
        shutil.copyfile(mine.data / "train.npy", tmp_path / "new")
        (tmp_path / "new").replace(mine.data / "validation.npy")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "validation.npy was changed, cut or replaced since it was opened" in err
    assert [event["metadata"]["status"] for event in events(out, "run_stop")] == ["aborted"]


def test_a_loss_that_is_not_finite_ends_the_run_at_once(tiny: Tiny, tmp_path: Path) -> None:
    done = run_alone(tiny.environment(tmp_path, LR="1e30", MAX_STEPS="40") | FAST)
    assert done.returncode == 1
    assert len(errors(done)) == 1
    assert "loss is nan at step" in errors(done)[0]
    assert "on rank 0" in errors(done)[0]
    stop = events(done.stdout, "run_stop")[0]["metadata"]
    assert stop["status"] == "aborted"
    assert stop["samples_count"] < 40 * 8


def test_a_port_in_use_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_alone(tiny.environment(tmp_path) | FAST | {"MASTER_PORT": port})
    assert done.returncode == 1
    assert len(errors(done)) == 1
    assert port in errors(done)[0]
    assert "set another MASTER_PORT" in errors(done)[0]


def test_the_target_ends_the_run_and_the_adapter_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    changes = {"TARGET_LOSS": "9", "SAVE_ADAPTER": "1", "DGXNGPU": "2", "TP": "2", "SP": "1", "MAX_STEPS": "20"}
    done = run_training(tiny.environment(tmp_path, **changes), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(events(done.stdout, "eval_accuracy")) == 1
    assert events(done.stdout, "run_stop")[0]["metadata"]["status"] == "success"
    assert sorted(path.name for path in (tmp_path / "adapter_1").iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_a_full_disk_while_the_adapter_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    """One line and status 1, but the run was a success and its log says so. No file may grow beyond 10 KB here."""
    environment = tiny.environment(tmp_path, TARGET_LOSS="9", SAVE_ADAPTER="1", MAX_STEPS="20") | FAST
    command = ["prlimit", "--fsize=10000", ROOT / "scripts/run_and_time.sh"]
    done = subprocess.run(command, env=clean_environment(**environment), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert len(errors(done)) == 1
    assert f"{tmp_path}/adapter_1: the adapter could not be saved (" in errors(done)[0]
    assert events(done.stdout, "run_stop")[0]["metadata"]["status"] == "success"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*adapter*"))


def test_a_dead_rank_ends_the_others_within_a_minute(tiny: Tiny, tmp_path: Path) -> None:
    environment = tiny.environment(tmp_path, DGXNGPU="2", MINIBS="4", MAX_STEPS="100000", TARGET_LOSS="0")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    process = subprocess.Popen(
        [*torchrun, ROOT / "scripts/run_and_time.sh"],
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if '"train_loss"' in line:
                break
        os.kill(rank_process(process.pid, rank=1), signal.SIGKILL)
        killed = time.monotonic()
        out, err = process.communicate(timeout=120)
        assert time.monotonic() - killed < 60
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "rank" in err
    assert [event["metadata"]["status"] for event in events(out, "run_stop")] == ["aborted"]


def rank_process(parent: int, rank: int) -> int:
    """The training process of a rank below torchrun."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    for pid in children.stdout.split():
        if f"RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes().replace(b"LOCAL_RANK", b""):
            return int(pid)
    raise AssertionError(f"no process of rank {rank}: {children.stdout}")
