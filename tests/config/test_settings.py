"""The environment -> Settings: every shipped config as a golden file, every refusal by name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.environments import VALID
from llama2_lora.config import settings as module
from llama2_lora.config.settings import Settings, SettingsError, check_paths, variables, walltime_minutes

CONFIGS = sorted(path for path in ROOT.glob("config_*_*x*x*.sh"))

# Variables that a config exports for a library, and where the reader can be seen.
LIBRARY_VARIABLES = {
    "OMP_NUM_THREADS": "OpenMP",
    "HF_HUB_OFFLINE": "huggingface_hub/constants.py",
    "PYTHONDONTWRITEBYTECODE": "CPython",
    "CUDA_DEVICE_MAX_CONNECTIONS": "CUDA, megatron/training, nemo megatron_comm_overlap.py",
    "PYTORCH_CUDA_ALLOC_CONF": "torch",
    "NCCL_NVLS_ENABLE": "NCCL",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "torch, nemo megatron_strategy.py",
}


def sourced(config: Path) -> dict[str, str]:
    """What `source CONFIG` exports in an empty environment."""
    script = f'source "{config}" && env -0'
    out = subprocess.run(["env", "-i", "bash", "-c", script], capture_output=True, text=True, check=True).stdout
    pairs = dict(item.split("=", 1) for item in out.split("\0") if item)
    return {k: v for k, v in pairs.items() if k not in ("PWD", "SHLVL", "_")}


def problems(**changes: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(VALID | changes)
    return str(caught.value).splitlines()


def test_there_are_configs() -> None:
    assert {"config_CPU_1x2x4.sh", "config_DGXH100_1x8x4.sh", "config_DGXH100_8x8x2.sh"} <= {c.name for c in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_resolves_to_its_golden_file(config: Path) -> None:
    """UPDATE_GOLDEN=1 writes the files anew: then read the difference."""
    settings = Settings.from_env(sourced(config))
    resolved = dataclasses.asdict(settings) | {
        "derived": {
            "data_parallel_size": settings.data_parallel_size,
            "global_batch_size": settings.global_batch_size,
            "eval_every_steps": settings.eval_every_steps,
            "first_eval_step": settings.eval_steps[0],
        }
    }
    golden = ROOT / "tests" / "golden" / f"{config.stem}.json"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(resolved, indent=2) + "\n")
    assert json.loads(json.dumps(resolved)) == json.loads(golden.read_text())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_exports_only_what_somebody_reads(config: Path) -> None:
    assert sourced(config).keys() - variables() - LIBRARY_VARIABLES.keys() == set()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_named_after_its_values(config: Path) -> None:
    exported = sourced(config)
    assert config.stem == f"config_{exported['DGXSYSTEM']}"
    shape = re.fullmatch(r".*_(\d+)x(\d+)x(\d+)", config.stem)
    assert shape
    assert shape.groups() == (exported["DGXNNODES"], exported["DGXNGPU"], exported["MINIBS"])


def test_submitter_may_be_set_before_sourcing() -> None:
    script = f'export MLPERF_SUBMITTER="Our Site"; source "{CONFIGS[-1]}" && printf %s "$MLPERF_SUBMITTER"'
    out = subprocess.run(["env", "-i", "bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "Our Site"


def test_missing_variables_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({})
    named = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert named == {"DGXSYSTEM", "DGXNNODES", "DGXNGPU", "MINIBS", "LR", "MAX_STEPS"}


def test_wrong_values_are_reported_together() -> None:
    assert problems(TP="four", FP8="maybe", LR="nan", MBS="0", PLATFORM="tpu", SEED="-1") == [
        "PLATFORM=tpu: must be one of gpu, cpu",
        "TP=four: must be an integer",
        "MBS=0: must be at least 1",
        "LR=nan: must be a finite number",
        "FP8=maybe: must be 0 or 1",
        "SEED=-1: must be at least 0",
    ]


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({"TP": "8", "CP": "2"}, "TP*PP*CP=8*1*2=16: must divide DGXNNODES*DGXNGPU=1*8=8"),
        ({"DGXNNODES": "2", "DGXSYSTEM": "X_2x8x4", "TP": "16"}, "TP=16: must not exceed DGXNGPU=8"),
        ({"DGXNNODES": "3", "DGXSYSTEM": "X_3x8x4", "TP": "3"}, "TP=3: must divide DGXNGPU=8"),
        ({"TP": "1", "SP": "1"}, "SP=1: needs TP > 1"),
        ({"TP_COMM_OVERLAP": "1"}, "TP_COMM_OVERLAP=1: needs SP=1"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: must equal DGXNNODES*DGXNGPU=1*8=8"),
        ({"WORLD_SIZE": "8", "RANK": "8"}, "RANK=8: must be below WORLD_SIZE=8"),
        ({"WALLTIME": "an hour"}, "WALLTIME=an hour: must be a Slurm time"),
        ({"DGXSYSTEM": "DGXH100_1x8x2"}, "DGXSYSTEM=DGXH100_1x8x2: must end in _1x8x4"),
        ({"MBS": "3"}, "MBS=3: must divide MINIBS=4"),
        ({"CP": "2", "MAX_SEQLEN": "8190", "MLPERF_DIVISION": "open"}, "MAX_SEQLEN=8190: must be divisible by 2*CP=4"),
        ({"SP": "1", "MAX_SEQLEN": "8190", "MLPERF_DIVISION": "open"}, "MAX_SEQLEN=8190: must be divisible by TP*CP=4"),
        ({"TP": "4", "PP": "2", "CPU_OFFLOAD_LAYERS": "4"}, "CPU_OFFLOAD_LAYERS=4: needs PP=1"),
        ({"RECOMPUTE": "full", "CPU_OFFLOAD_LAYERS": "4"}, "CPU_OFFLOAD_LAYERS=4: needs RECOMPUTE=none"),
        ({"FP8": "1", "FP4": "1"}, "FP4=1: contradicts FP8=1"),
        ({"FP8_DPA": "1"}, "FP8_DPA=1: needs FP8=1"),
        ({"FP8_PARAMS": "1"}, "FP8_PARAMS=1: needs FP8=1"),
        ({"FP8": "1", "FP8_DPA": "1", "FP8_RECIPE": "mxfp8"}, "FP8_DPA=1: needs FP8_RECIPE=delayed"),
        ({"PLATFORM": "cpu", "FP8": "1"}, "FP8=1: needs PLATFORM=gpu"),
        ({"MAX_SEQLEN": "4096"}, "MAX_SEQLEN=4096: is fixed by the closed division; set it to 8192"),
        ({"GRADIENT_CLIP_NORM": "1"}, "GRADIENT_CLIP_NORM=1.0: is fixed by the closed division; set it to 0.3"),
        ({"WEIGHT_DECAY": "0"}, "WEIGHT_DECAY=0.0: is fixed by the closed division"),
        ({"LORA_RANK": "8"}, "LORA_RANK=8: is fixed by the closed division"),
        ({"LORA_ALPHA": "16"}, "LORA_ALPHA=16: is fixed by the closed division"),
        ({"LORA_DROPOUT": "0"}, "LORA_DROPOUT=0.0: is fixed by the closed division"),
        ({"TARGET_LOSS": "0.93"}, "TARGET_LOSS=0.93: is fixed by the closed division"),
        ({"EVAL_EVERY_SEQUENCES": "96"}, "EVAL_EVERY_SEQUENCES=96: is fixed by the closed division"),
        ({"EVAL_SKIP": "0"}, "EVAL_SKIP=0: is fixed by the closed division; unset it or MLPERF_DIVISION=open"),
    ],
)
def test_contradiction(changes: dict[str, str], starts: str) -> None:
    found = problems(**changes)
    assert len(found) == 1, found
    assert found[0].startswith(starts)


def test_open_division_and_cpu_may_change_what_is_fixed() -> None:
    changes = {"TARGET_LOSS": "2.5", "LORA_DROPOUT": "0", "EVAL_SKIP": "0"}
    for free in ({"MLPERF_DIVISION": "open"}, {"PLATFORM": "cpu"}):
        settings = Settings.from_env(VALID | changes | free)
        assert settings.evaluation.target_loss == 2.5
        assert settings.eval_steps[0] == 48


def test_empty_means_unset() -> None:
    settings = Settings.from_env(VALID | {"SEED": "", "CP": ""})
    assert settings.run.seed is None
    assert settings.parallel.cp == 1


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("45", 45), ("45:30", 45.5), ("1:30:00", 90), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:30", 1440.5)],
)
def test_walltime(text: str, minutes: float) -> None:
    assert walltime_minutes(text) == minutes


def test_paths_are_checked_together(tmp_path: Path) -> None:
    missing = {"DATA_PATH": f"{tmp_path}/d", "CKPT_PATH": f"{tmp_path}/c", "RESULTS_PATH": f"{tmp_path}/r"}
    with pytest.raises(SettingsError) as caught:
        check_paths(Settings.from_env(VALID | missing))
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["DATA_PATH", "DATA_PATH", "CKPT_PATH", "RESULTS_PATH"]
    assert "train.npy does not exist" in lines[0]


def test_readme_table_is_made_from_the_fields() -> None:
    readme = (ROOT / "README.md").read_text()
    assert module.markdown_table() in readme, "run: PYTHONPATH=src python -m llama2_lora.config.settings"
