"""Runs by the real command that go wrong: one clear error, a non-zero status, a log that is closed, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
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
        file = next((mine.checkpoint / "weights").glob("*linear_fc1.weight")) / ".zarray"
        header = json.loads(file.read_text())
        header["shape"][1] *= 2
        file.write_text(json.dumps(header))
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
    mine = copy_of(tiny, tmp_path)
    (norm,) = (mine.checkpoint / "weights/module.decoder.final_layernorm.weight").glob("[0-9]*")
    norm.write_bytes(np.full(norm.stat().st_size // 4, np.inf, np.float32).tobytes())
    done = run_alone(mine.environment(tmp_path, MAX_STEPS="40") | FAST)
    assert done.returncode == 1, done.stderr[-2000:]
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
    assert "GPU available" not in done.stdout + done.stderr, "libraries are quiet; and there is no GPU"
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


# ---- Runs that end in the middle

PROGRAM = "import sys; sys.path[:0] = ['src', 'tests']; import train; {change}; sys.exit(train.main())"


def run_changed(environment: dict[str, str], change: str) -> subprocess.CompletedProcess[str]:
    """One rank of train.py's main, with one thing changed first."""
    return subprocess.run(
        [ROOT / "scripts/run_and_time.sh", "-c", PROGRAM.format(change=change)],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=200,
    )


def start(environment: dict[str, str], ranks: int, change: str = "pass") -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    return subprocess.Popen(
        [*torchrun, ROOT / "scripts/run_and_time.sh", "-c", PROGRAM.format(change=change)],
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[str, str]:
    try:
        return process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read()[-3000:])


ENDLESS = {"MAX_STEPS": "100000", "TARGET_LOSS": "0"}


def test_sigterm_ends_a_run_with_status_1(tiny: Tiny, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [ROOT / "scripts/run_and_time.sh"],
        env=clean_environment(**(tiny.environment(tmp_path, **ENDLESS) | FAST)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, '"train_loss"')
    process.terminate()
    out, err = finish(process)
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line.startswith("error: ")] == ["error: rank 0: stopped by a signal"]
    assert "Traceback" not in err
    assert [event["metadata"]["status"] for event in events(out, "run_stop")] == ["aborted"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_ends_the_run_and_is_named(tiny: Tiny, tmp_path: Path, rank: int) -> None:
    """With the limit of two minutes made one of twenty seconds."""
    quick = "import llama2_lora.training.cpu as c; exec('with c.cpu_platform(): from llama2_lora.training import watch')"
    quick += "; watch.BEAT_SECONDS, watch.SILENT_SECONDS = 1, 20"
    process = start(tiny.environment(tmp_path, DGXNGPU="2", MINIBS="4", **ENDLESS), 2, quick)
    wait_for(process, '"train_loss"')
    os.kill(rank_process(process.pid, rank=rank), signal.SIGSTOP)
    out, err = finish(process)
    assert process.returncode != 0
    assert f"error: rank {rank} has been frozen for 20 s" in err
    if rank == 1:  # rank 0 writes the log: where it is frozen, the launcher closes it
        assert [event["metadata"]["status"] for event in events(out, "run_stop")] == ["aborted"]


def test_a_disk_that_fills_while_the_adapter_is_saved_leaves_the_success(tiny: Tiny, tmp_path: Path) -> None:
    """The disk's stand-in is a limit on file sizes that the adapter (20 kB) exceeds."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    done = run_changed(tiny.environment(tmp_path, TARGET_LOSS="9", SAVE_ADAPTER="1") | FAST, limit)
    assert done.returncode == 1
    assert len(errors(done)) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert [event["metadata"]["status"] for event in events(done.stdout, "run_stop")] == ["success"]


def test_an_error_that_nobody_foresaw_is_one_line_with_its_place(tiny: Tiny, tmp_path: Path) -> None:
    broken = "train.fit = lambda *_: {}['lost']"
    done = run_changed(tiny.environment(tmp_path) | FAST, broken)
    assert done.returncode == 1
    assert errors(done) == ["error: rank 0: KeyError: 'lost' (<string>:1)"]
    assert "Traceback" not in done.stderr


def test_an_adapter_without_a_gradient_ends_the_run_at_the_second_step(tiny: Tiny, tmp_path: Path) -> None:
    """What RECOMPUTE=full did on a frozen embedding: 40 sequences or 80, the evaluation's loss stayed the same."""
    broken = "import llama2_lora.training.cpu as c; exec('with c.cpu_platform(): from llama2_lora.training import model')"
    broken += "; model.let_gradients_through_recomputation = lambda m: None"
    done = run_changed(tiny.environment(tmp_path, RECOMPUTE="full") | FAST, broken)
    assert done.returncode == 1
    assert "4 of 4 adapters get no gradient, the first of them decoder.layers.0.self_attention.linear_qkv" in errors(done)[0]
    stop = events(done.stdout, "run_stop")[0]["metadata"]
    assert (stop["status"], stop["samples_count"]) == ("aborted", 16)


def test_torchrun_by_hand_ends_a_missed_target_with_a_line(tiny: Tiny, tmp_path: Path) -> None:
    environment = tiny.environment(tmp_path, DGXNGPU="2", MINIBS="4", MAX_STEPS="2")
    done = subprocess.run(
        [ROOT / "scripts/torchrun.py", "--standalone", "--nproc-per-node=2", "--no-python", ROOT / "scripts/run_and_time.sh"],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert [event["metadata"]["status"] for event in events(done.stdout, "run_stop")] == ["aborted"]
    assert re.search(r"^torchrun.py: rank [01] ended with status 1$", done.stderr, flags=re.M)
    assert "ChildFailedError" not in done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_by_hand_keeps_the_status_of_wrong_settings(tiny: Tiny, tmp_path: Path) -> None:
    environment = tiny.environment(tmp_path, MBS="3")
    done = subprocess.run(
        [ROOT / "scripts/torchrun.py", "--standalone", "--nproc-per-node=1", "--no-python", ROOT / "scripts/run_and_time.sh"],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
