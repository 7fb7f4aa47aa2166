"""scripts/measure.py as a command, on the CPU: the same code as on a GPU, but for the clock and the allocator."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ROOT, obey_ctrl_c
from helpers.training_runs import clean_environment
from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.forecast import measured
from llama2_lora.forecast.measured import Names
from llama2_lora.training import measure_device, measure_ring
from llama2_lora.training.measure_device import Device, device_of

COMMAND = [sys.executable, ROOT / "scripts/measure.py"]
H100 = ROOT / "config_DGXH100_1x8x4.sh"


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=550
    )


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("default")
    return run(ROOT / "config_CPU_1x2x4.sh", folder=folder), folder / "measured_CPU_1x2x4.json"


def test_the_rehearsals_config_is_measured_as_it_stands(default: tuple) -> None:
    done, file = default
    assert done.returncode == 0, done.stderr[-3000:]
    found = measured.read(file)
    assert found.complete
    assert found.finite
    assert [(p.layers, len(p.step_seconds)) for p in found.passes] == [(4, 10)]
    assert found.passes[0].eval_seconds
    assert sum(kernel.seconds for kernel in found.kernels) > 0
    for text in (
        "CPU_1x2x4: one rank, on CPU",
        "throughput",
        "activations: MLP",
        "aten::mm",
        "--measured measured_CPU_1x2x4.json",
    ):
        assert text in done.stdout, text


def test_memory_by_hand(default: tuple) -> None:
    """fp32, hidden 128, FFN 384, 8 heads, 2 groups, 4 layers, vocabulary 768, LoRA 16; 4 rows of 256 tokens; DP 2."""
    sizes = {item.name: item.bytes for item in measured.read(default[1]).memory.items}
    qkv, tokens = 128 + 2 * 2 * 16, 4 * 256
    assert sizes[Names.LINEAR] == 4 * 4 * 128 * (qkv + 128 + 3 * 384)
    assert sizes[Names.OUTSIDE] == 4 * (2 * 768 * 128 + 9 * 128)
    adapter = 4 * 16 * (128 + qkv + 128 + 128)
    assert sizes[Names.ADAPTER] == sizes[Names.GRADIENTS] == 4 * adapter
    # fp32 needs no master copy of its own: parameter and two moments, one half of each on this rank
    assert sizes[Names.ADAMW] == pytest.approx(3 * 4 * adapter / 2, rel=0.01)
    assert sizes[Names.SWIGLU] == 4 * 4 * tokens * 2 * 384
    assert sizes[Names.LOGITS] >= 4 * tokens * 768


def test_a_few_layers_in_fp8_over_a_world_of_eight(tmp_path: Path) -> None:
    """TP, CP, SP, DP, FP8 weights and userbuffers asked for: one process of eight, 2 of 4 layers."""
    config = tmp_path / "config_CPU_2x4x4.sh"
    changes = "DGXSYSTEM=CPU_2x4x4 DGXNNODES=2 DGXNGPU=4 TP=2 CP=2 SP=1 MBS=2 VAL_MBS=2 FP8=1 FP8_PARAMS=1 TP_COMM_OVERLAP=1"
    config.write_text(f"source {ROOT}/config_CPU_1x2x4.sh\nexport {changes}\n")
    done = run(config, "--layers", "2", "--steps", "2", "--output", "few.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = measured.read(tmp_path / "few.json")
    assert [p.layers for p in found.passes] == [2, 1]
    assert "4 layers" in done.stdout
    assert found.extrapolated == "1 and 2 layers for 4"
    assert found.memory
    sizes = {item.name: item.bytes for item in found.memory.items}
    weights = 2 * 128 * (192 + 128 + 3 * 384) / 2  # of two layers, over TP=2, a byte each
    assert sizes[Names.LINEAR] == pytest.approx(weights, rel=0.01)
    assert sizes[Names.COPIES] == pytest.approx(weights, rel=0.01)  # a pretended Hopper keeps transposes


def test_the_gpu_rehearsals_settings_run(tmp_path: Path) -> None:
    """FP8 weights, MBS 1 and all else of config_common_rehearsal.sh, with the emulated kernels."""
    config = tmp_path / "config_GPU_1x1x8.sh"
    config.write_text(f"source {ROOT}/config_GPU_1x1x8.sh\nexport PLATFORM=cpu\n")
    done = run(config, "--layers", "2", "--steps", "1", "--output", "gpu.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = measured.read(tmp_path / "gpu.json")
    assert found.complete
    assert found.finite
    assert Names.COPIES in {item.name for item in found.memory.items}


def test_the_rings_function_is_the_one_that_was_read() -> None:
    """With another Transformer Engine nothing would be replaced, and values of a measurement with CP would be garbage."""
    module = importlib.import_module(measure_ring.MODULE)
    assert measure_ring.source_hash(getattr(module, measure_ring.NAME)) == measure_ring.SOURCE


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_process_and_the_figures_so_far(number: signal.Signals, status: int, tmp_path: Path) -> None:
    output = tmp_path / "m.json"
    command = [*map(str, COMMAND), str(ROOT / "config_CPU_1x2x4.sh"), "--steps", "100000", "--output", str(output)]
    with subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=obey_ctrl_c,
    ) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (output.is_file() and '"step_seconds": [\n' in output.read_text()):
            time.sleep(0.5)
        process.send_signal(number)
        try:
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()  # else one that does not end is waited for
    assert process.returncode == status, error[-3000:]
    assert "Traceback" not in error
    found = measured.read(output)
    assert found.passes[0].step_seconds
    assert not found.complete
    assert "CPU_1x2x4: one rank, on CPU" in out
    left = subprocess.run(["ps", "-o", "pid=", "--sid", str(process.pid)], capture_output=True, text=True)
    assert left.stdout.split() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config_none.sh"], "config_none.sh: no such file"),
        ([H100, "--layers", "1"], "--layers 1: must be at least 2"),
        ([H100, "--steps", "0"], "--steps 0: must be at least 1"),
    ],
)
def test_wrong_usage(arguments: list, says: str, tmp_path: Path) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_one_line(tmp_path: Path) -> None:
    done = run(H100, folder=tmp_path)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error" in line] == done.stderr.splitlines()[-1:]
    assert "has no CUDA: measure in the image, or with PLATFORM=cpu" in done.stderr


# ---- GPUs that this machine does not have ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12020). Please update",
            "driver is too old for this torch",
        ),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "no NVIDIA driver: run on a node"),
        ("No CUDA GPUs are available", "no GPU: No CUDA GPUs are available"),
        ("Unexpected error from cudaGetDeviceCount().\nDid you run some cuda functions", "no GPU: Unexpected error"),
    ],
)
def test_every_reason_is_one_line(reason: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(measure_device.torch.cuda, "init", init)
    with pytest.raises(ValueError, match=says) as caught:
        device_of(Settings.from_env(source(H100)))
    assert "\n" not in str(caught.value)


def session(device: Device, config: Path = H100, layers: int | None = None):
    from llama2_lora.training.measure import Session

    return Session(Settings.from_env(source(config)), device, layers, 1, Path("unused.json"))


def texts(found: Any) -> list[str]:
    return [finding.text for finding in found.findings]


def test_what_does_not_fit_says_what_makes_room() -> None:
    with pytest.raises(
        ValueError, match=r"^does not fit NVIDIA L4: one rank needs about \d\d\.\d GB, there are 24\.0; "
    ) as caught:
        session(Device("NVIDIA L4", "", 24 * 10**9, "13.0"))
    assert "--layers" in str(caught.value)


def test_more_layers_than_a_rank_has() -> None:
    with pytest.raises(ValueError, match="--layers 81: a rank of this config has 80"):
        session(Device("NVIDIA H100 80GB HBM3", "H100", 85_520_809_984, "13.0"), layers=81)


def test_another_part_is_measured_and_named() -> None:
    found = session(Device("NVIDIA H200", "H200", 150_000_000_000, "13.0"))
    assert "the config names H100, this is NVIDIA H200: measured as it is, nothing is scaled" in texts(found)
    assert found.account.capacity == pytest.approx(150e9, rel=1e-4)


def test_the_part_that_the_config_names_needs_no_word() -> None:
    found = session(Device("NVIDIA H100 80GB HBM3", "H100", 85_520_809_984, "13.0"))
    assert texts(found) == ["TP_COMM_OVERLAP: userbuffers need the other ranks; measured without them"]


def test_the_file_is_strict_json(default: tuple) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(default[1].read_text(), parse_constant=refuse)
