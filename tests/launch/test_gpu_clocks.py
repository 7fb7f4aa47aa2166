"""VBOOST and GPU_CLOCKS on one node: what is set, what not and why, what is put back. bin/nvidia-smi plays the GPUs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT

HERE = ROOT / "tests/launch"
Node = Callable[..., str]


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    (tmp_path / "gpus").mkdir()
    return tmp_path / "gpus"


@pytest.fixture
def node(tmp_path: Path, gpus: Path) -> Node:
    """Call gpu_clocks.sh as run.sub does; what it says, without the names of run.sub and host. sudo lets everybody."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sudo").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "bin/sudo").chmod(0o755)

    def call(what: str, *values: str, status: int = 0, smi: str = f"{HERE}/bin") -> str:
        command = ["bash", ROOT / "scripts/lib/gpu_clocks.sh", what, tmp_path / "a note", *values]
        environment = {"PATH": f"{tmp_path}/bin:{smi}:/usr/bin:/bin", "GPU_STATE": str(gpus)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return "".join(line.split(": ", 2)[2] + "\n" for line in done.stdout.splitlines())

    return call


def test_set_and_put_back(node: Node, gpus: Path) -> None:
    (gpus / "vboost").write_text("2 2\n")
    assert node("set", "1", "1200,1980") == "VBOOST=1: set, was 2\nGPU_CLOCKS=1200,1980: locked\n"
    assert (gpus / "vboost").read_text() == "1 1\n"
    assert (gpus / "locked").read_text() == "1200,1980 1200,1980\n"
    assert node("restore") == "vboost put back: 2\nclocks put back: unlocked\n"
    assert (gpus / "vboost").read_text() == "2 2\n"
    assert (gpus / "locked").read_text() == "no no\n"
    assert node("restore") == "", "once"


def test_what_is_not_asked_for_is_left_alone(node: Node, gpus: Path) -> None:
    node("set", "1", "")
    node("restore")
    assert "clocks" not in (gpus / "calls").read_text()


def test_a_second_life_puts_back_what_the_first_one_found(node: Node, gpus: Path) -> None:
    node("set", "3", "")
    assert node("set", "3", "") == "VBOOST=3: it was set\n"
    assert node("set", "4", "") == "VBOOST=4: set, was 3\n"
    node("restore")
    assert (gpus / "vboost").read_text() == "0 0\n"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("refuses", "VBOOST=1: not set, still 0: Failed to set it for GPU 00000000:1B:00.0: Insufficient Permissions"),
        ("refuses", "GPU_CLOCKS=1980: not set: Failed to set it for GPU 00000000:1B:00.0: Insufficient Permissions"),
        ("no_slider", "VBOOST=1: not set: nvidia-smi boost-slider --list shows none"),
        ("no_locks", "GPU_CLOCKS=1980: not set: Setting locked GPU clocks is not supported for GPU 00000000:1B:00.0."),
    ],
)
def test_what_cannot_be_set_is_a_warning_with_its_reason(node: Node, gpus: Path, file: str, said: str) -> None:
    (gpus / file).write_text("*")
    assert f"warning: {said}" in node("set", "1", "1980")


def test_nothing_is_put_back_where_nothing_was_set(node: Node, gpus: Path) -> None:
    (gpus / "refuses").write_text("*")
    node("set", "1", "1980")
    calls = (gpus / "calls").read_text()
    assert node("restore") == ""
    assert (gpus / "calls").read_text() == calls


def test_a_value_beyond_the_sliders(node: Node) -> None:
    assert node("set", "9", "") == "warning: VBOOST=9: not set, still 0: Invalid Argument\n"


def test_gpus_that_differ_are_left_alone(node: Node, gpus: Path) -> None:
    (gpus / "vboost").write_text("0 2\n")
    assert "not set: the GPUs differ (0 2)" in node("set", "1", "")
    assert (gpus / "vboost").read_text() == "0 2\n"


def test_a_node_without_nvidia_smi(node: Node) -> None:
    assert "VBOOST=1: not set" in node("set", "1", "", smi="/nowhere")


def test_what_only_some_gpus_took_is_taken_back_at_once(node: Node, gpus: Path) -> None:
    (gpus / "vboost").write_text("2 2\n")
    (gpus / "second_refuses").write_text("*--vboost 1")
    assert "warning: VBOOST=1: not set, still 2: Failed to set it" in node("set", "1", "")
    (gpus / "second_refuses").write_text("--lock*")
    assert "warning: GPU_CLOCKS=1980: not set: Failed to set it" in node("set", "", "1980")
    assert (gpus / "vboost").read_text() == "2 2\n"
    assert (gpus / "locked").read_text() == "no no\n"
    assert node("restore") == "", "nothing is left to put back"


def test_what_could_not_be_taken_back_stays_noted(node: Node, gpus: Path) -> None:
    (gpus / "second_refuses").write_text("*--vboost 1")
    (gpus / "refuses").write_text("*--vboost 0")
    assert "warning: VBOOST=1: not set, still 0 1: Failed to set it" in node("set", "1", "")
    (gpus / "second_refuses").write_text("--lock*")
    (gpus / "refuses").write_text("--reset*")
    assert "warning: GPU_CLOCKS=1980: set on some GPUs: Failed to set it" in node("set", "", "1980")
    (gpus / "refuses").unlink()
    assert node("restore") == "vboost put back: 0\nclocks put back: unlocked\n"
    assert (gpus / "vboost").read_text() == "0 0\n"
    assert (gpus / "locked").read_text() == "no no\n"


def test_what_could_not_be_put_back_is_told_and_stays_noted(node: Node, gpus: Path) -> None:
    node("set", "1", "1980")
    (gpus / "refuses").write_text("*--vboost*")
    said = node("restore", status=1).splitlines()
    assert said[0].startswith("error: vboost: could not be put back to 0, ")
    assert said[0].endswith("Insufficient Permissions")
    assert said[1:] == ["clocks put back: unlocked"]
    (gpus / "refuses").unlink()
    assert node("restore") == "vboost put back: 0\n"
    assert (gpus / "vboost").read_text() == "0 0\n"
