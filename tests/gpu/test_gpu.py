"""On a GPU: emulated kernels against the real ones, an FP8 run, graphs against none, memory against its account."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT
from helpers.training_runs import Tiny, clean_environment, events, values
from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.forecast import measured
from llama2_lora.forecast.measured import Names
from llama2_lora.forecast.memory import memory_per_gpu
from llama2_lora.gpus import ACCELERATORS
from llama2_lora.llama2 import LLAMA2_70B
from llama2_lora.weights.checkpoint import read_adapter

pytestmark = pytest.mark.gpu
CONFIG = ROOT / "config_DGXH100_1x8x4.sh"

# Of the largest value. Products of FP8 numbers are exact on both sides; outputs are bf16 on the GPU and fp32 in the emulation.
TOLERANCES = {"linear": 0.02, "norm_linear": 0.03, "attention": 0.02, "adam": 1e-6}
IMAGE = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST")


def environment(**variables: str) -> dict[str, str]:
    return clean_environment() | {name: os.environ[name] for name in IMAGE if name in os.environ} | variables


def kernels(where: str, folder: Path) -> dict[str, np.ndarray]:
    out = folder / f"{where}.npz"
    # A GPU in sight would be refused by PLATFORM=cpu
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if where == "cpu" else {}
    command = [sys.executable, ROOT / "tests/gpu/kernels.py", where, out]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=f"{ROOT}/src", **hidden), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


def test_emulated_kernels_compute_what_the_real_ones_do(tmp_path: Path) -> None:
    emulated, real = kernels("cpu", tmp_path), kernels("gpu", tmp_path)
    assert emulated.keys() == real.keys()
    differences = {name: float(np.abs(emulated[name] - real[name]).max() / np.abs(real[name]).max()) for name in real}
    assert {name: d for name, d in differences.items() if not d <= TOLERANCES[name.split(".")[0]]} == {}


@pytest.fixture(scope="module")
def tiny_bf16(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    checkpoint = tmp_path_factory.mktemp("bf16") / "checkpoint"
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", tiny.hugging_face, "--dtype", "bf16"]
    subprocess.run([*convert, "--output_path", checkpoint], check=True, capture_output=True)
    return Tiny(tiny.hugging_face, checkpoint, tiny.data)


def train(tiny: Tiny, results: Path, **changes: str) -> str:
    """The log of one run on one GPU, which must come to its end: the target is out of its reach, so its status is 1."""
    settings = tiny.environment(results, PLATFORM="gpu", REHEARSAL="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **changes)
    done = subprocess.run(
        [ROOT / "scripts/run_and_time.sh"], env=environment(**settings), capture_output=True, text=True, timeout=500
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert len(events(done.stdout, "run_stop")) == 1, done.stderr[-3000:]
    assert "error:" not in done.stderr
    return done.stdout


def test_fp8_weights_from_restore_to_teardown(tiny_bf16: Tiny, tmp_path: Path) -> None:
    """They are loaded, trained beside, evaluated and written around: with the losses of bf16 to 3%, and an adapter."""
    fp8 = {"FP8": "1", "FP8_PARAMS": "1", "WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "1", "SAVE_ADAPTER": "1"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    losses = [
        values(train(tiny_bf16, tmp_path / name, **changes), "eval_accuracy") for name, changes in (("a", fp8), ("b", {}))
    ]
    assert len(losses[0]) == len(losses[1]) > 0
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert (tmp_path / "a/adapter_1").is_dir()


@pytest.mark.parametrize("precision", [{}, {"FP8": "1", "FP8_DPA": "1"}])
@pytest.mark.parametrize("kind", ["layer", "iteration"])
def test_graphs_change_nothing(kind: str, precision: dict[str, str], tiny_bf16: Tiny, tmp_path: Path) -> None:
    """Losses and the trained adapter against a run without graphs. Without dropout: graphs draw other masks."""
    common = {"WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "2", "LORA_DROPOUT": "0", "SAVE_ADAPTER": "1"} | precision
    # A logged loss is read on the host: with one at the end alone, steps run into each other as they do in a real run.
    common |= {"MAX_STEPS": "24", "LOG_EVERY_STEPS": "24"}
    logs, adapters = [], []
    for graphs in ("none", kind):
        (folder := tmp_path / graphs).mkdir()
        logs.append(train(tiny_bf16, folder, CUDA_GRAPHS=graphs, **common))
        adapters.append(read_adapter(folder / "adapter_1")[0])
    for key in ("train_loss", "eval_accuracy"):
        assert values(logs[1], key) == pytest.approx(values(logs[0], key), rel=1e-3)
    assert adapters[0].keys() == adapters[1].keys()
    for name, matrix in adapters[0].items():
        assert np.abs(adapters[1][name] - matrix).max() <= 0.02 * np.abs(matrix).max(), name


def test_both_kinds_of_graphs_draw_the_same_masks(tiny_bf16: Tiny, tmp_path: Path) -> None:
    """With dropout, step by step: from the same generators, and none in an evaluation."""
    logs = []
    for kind in ("layer", "iteration"):
        (folder := tmp_path / kind).mkdir()
        warm = {"WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "2", "LORA_DROPOUT": "0.5"}
        logs.append(train(tiny_bf16, folder, CUDA_GRAPHS=kind, **warm))
    for key in ("train_loss", "eval_accuracy"):
        assert values(logs[1], key) == pytest.approx(values(logs[0], key), rel=1e-3)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> measured.Measured:
    """Two layers of the 70B's width, as a rank of DGXH100_1x8x4 has them."""
    output = tmp_path_factory.mktemp("measured") / "two.json"
    command = [sys.executable, ROOT / "scripts/measure.py", CONFIG, "--layers", "2", "--steps", "3"]
    done = subprocess.run([*command, "--output", output], env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return measured.read(output)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        (Names.OUTSIDE, 0.01),
        (Names.LINEAR, 0.01),
        (Names.COPIES, 0.01),
        (Names.ADAPTER, 0.01),
        (Names.GRADIENTS, 0.05),
        (Names.ADAMW, 0.05),
        (Names.ATTENTION, 0.15),
        (Names.SWIGLU, 0.15),
    ],
)
def test_memory_is_as_the_account_says(two_layers: measured.Measured, name: str, tolerance: float) -> None:
    """Item by item against memory.py's, for the part that was measured; norms and adapters are looked at by eye."""
    settings = Settings.from_env(source(CONFIG))
    alone = replace(settings, performance=replace(settings.performance, tp_comm_overlap=False))
    account = memory_per_gpu(alone, replace(LLAMA2_70B, layers=2), ACCELERATORS[two_layers.accelerator or "H100"])
    rows = {name: (ours, theirs) for name, ours, theirs in measured.beside(replace(two_layers, stage_layers=2), account)}
    ours, theirs = rows[name]
    assert ours == pytest.approx(theirs, rel=tolerance)


def test_a_measurement_is_whole(two_layers: measured.Measured) -> None:
    assert two_layers.complete
    assert two_layers.finite
    assert [p.layers for p in two_layers.passes] == [2, 1]
    assert two_layers.memory
    assert two_layers.memory.peak
    kept = sum(item.bytes for item in two_layers.memory.items if not item.name.startswith("activations"))
    assert two_layers.memory.peak > kept
