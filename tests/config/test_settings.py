"""The environment -> Settings: every refusal by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import ROOT
from helpers.environments import VALID
from llama2_lora.config.page import settings_page
from llama2_lora.config.settings import Settings, SettingsError
from llama2_lora.config.values import walltime_minutes
from llama2_lora.node.files import check_paths

GRAPHS = {"CUDA_GRAPHS": "layer", "WARMUP_TRAIN_STEPS": "2"}


def problems(**changes: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(VALID | changes)
    return str(caught.value).splitlines()


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


UB = {"SP": "1", "TP_COMM_OVERLAP": "1"}


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({"TP": "8", "CP": "2"}, "TP*PP*CP=8*1*2=16: must divide DGXNNODES*DGXNGPU=1*8=8"),
        ({"DGXNNODES": "2", "DGXSYSTEM": "X_2x8x4", "TP": "16"}, "TP=16: must not exceed DGXNGPU=8"),
        ({"DGXNNODES": "3", "DGXSYSTEM": "X_3x8x4", "TP": "3"}, "TP=3: must divide DGXNGPU=8"),
        ({"TP": "1", "SP": "1"}, "SP=1: needs TP > 1"),
        ({"TP_COMM_OVERLAP": "1"}, "TP_COMM_OVERLAP=1: needs SP=1"),
        (UB | {"FP4": "1", "ACCELERATOR": "B200"}, "TP_COMM_OVERLAP=1: contradicts FP4=1"),
        (UB | {"FP8": "1", "FP8_RECIPE": "blockwise"}, "TP_COMM_OVERLAP=1: contradicts FP8_RECIPE=blockwise"),
        (UB | {"FP8": "1", "FP8_RECIPE": "tensorwise", "BF16_LAST_LAYERS": "1"}, "TP_COMM_OVERLAP=1: contradicts BF16_FIRST"),
        ({"FP4_HEAL_STEP": "350"}, "FP4_HEAL_STEP=350: needs FP4=1"),
        ({"FP4": "1", "ACCELERATOR": "B200", "FP4_HEAL_STEP": "800"}, "FP4_HEAL_STEP=800: must be below MAX_STEPS=800"),
        ({"TP": "1", "CP": "4", "VAL_CP": "2"}, "VAL_CP=2: must be 1 or CP=4"),
        ({"TP": "1", "CP": "4", "PP": "2", "VAL_CP": "2"}, "VAL_CP=2: must be 1 or CP=4"),
        ({"TP": "1", "CP": "2", "PP": "2", "VAL_CP": "1"}, "VAL_CP=1: needs PP=1, not 2"),
        ({"CP": "2", "SP": "1", "TP_COMM_OVERLAP": "1", "VAL_CP": "1"}, "VAL_CP=1: contradicts TP_COMM_OVERLAP=1"),
        ({"CUDA_GRAPHS": "step"}, "CUDA_GRAPHS=step: must be one of none, layer, iteration"),
        (GRAPHS | {"PP": "2"}, "CUDA_GRAPHS=layer: needs PP=1, not 2"),
        (GRAPHS | {"RECOMPUTE": "selective"}, "CUDA_GRAPHS=layer: contradicts RECOMPUTE=selective"),
        (GRAPHS | {"CPU_OFFLOAD_LAYERS": "4"}, "CUDA_GRAPHS=layer: contradicts CPU_OFFLOAD_LAYERS=4"),
        (GRAPHS | {"WARMUP_TRAIN_STEPS": "1"}, "CUDA_GRAPHS=layer: contradicts WARMUP_TRAIN_STEPS=1"),
        (GRAPHS | {"CUDA_GRAPHS": "iteration"}, "CUDA_GRAPHS=iteration: contradicts WARMUP_VALIDATION_STEPS=0"),
        ({"CP": "2", "CP_COMM": "all_gather", "FP8": "1", "FP8_DPA": "1"}, "CP_COMM=all_gather: contradicts FP8_DPA=1"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=4: must equal DGXNNODES*DGXNGPU=1*8=8"),
        ({"WORLD_SIZE": "8", "RANK": "8", "LOCAL_RANK": "0"}, "RANK=8: must be below WORLD_SIZE=8"),
        ({"WALLTIME": "an hour"}, "WALLTIME=an hour: must be a Slurm time"),
        ({"DGXSYSTEM": "DGXH100_1x8x2"}, "DGXSYSTEM=DGXH100_1x8x2: must end in _1x8x4"),
        ({"MBS": "3"}, "MBS=3: must divide MINIBS=4"),
        ({"CP": "2", "MAX_SEQLEN": "8190", "MLPERF_DIVISION": "open"}, "MAX_SEQLEN=8190: must be divisible by 2*CP=4"),
        ({"SP": "1", "MAX_SEQLEN": "8190", "MLPERF_DIVISION": "open"}, "MAX_SEQLEN=8190: must be divisible by TP*CP=4"),
        ({"TP": "4", "PP": "2", "CPU_OFFLOAD_LAYERS": "4"}, "CPU_OFFLOAD_LAYERS=4: needs PP=1"),
        ({"RECOMPUTE": "full", "CPU_OFFLOAD_LAYERS": "4"}, "CPU_OFFLOAD_LAYERS=4: needs RECOMPUTE=none"),
        ({"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "8"}, "LOCAL_RANK=8: must be below DGXNGPU=8"),
        ({"CONFIG_FILE": "config_mine.sh"}, "CONFIG_FILE=config_mine.sh: must be config_DGXH100_1x8x4.sh"),
        ({"MAX_STEPS": "191"}, "MAX_STEPS=191: must be at least 192, the step of the first evaluation"),
        ({"FP4": "1"}, "FP4=1: H100 has no NVFP4 units; set FP8=1 instead"),
        ({"FP8": "1", "FP8_RECIPE": "mxfp8"}, "FP8_RECIPE=mxfp8: H100 has no MXFP8 units"),
        ({"FP8": "1", "FP4": "1", "ACCELERATOR": "B200"}, "FP4=1: contradicts FP8=1"),
        ({"FP8_DPA": "1"}, "FP8_DPA=1: needs FP8=1"),
        ({"FP8_PARAMS": "1"}, "FP8_PARAMS=1: needs FP8=1"),
        ({"FP4_PARAMS": "1"}, "FP4_PARAMS=1: needs FP4=1"),
        ({"FP8_ACT": "1"}, "FP8_ACT=1: needs FP8=1 or FP4=1"),
        ({"BF16_FIRST_LAYERS": "1"}, "BF16_FIRST_LAYERS=1 BF16_LAST_LAYERS=0: need FP8=1 or FP4=1"),
        ({"BF16_LAST_LAYERS": "1", "FP8": "1"}, "BF16_FIRST_LAYERS=0 BF16_LAST_LAYERS=1: contradict FP8_RECIPE=delayed"),
        (
            {"BF16_LAST_LAYERS": "1", "FP4": "1", "FP4_PARAMS": "1", "ACCELERATOR": "B200"},
            "BF16_FIRST_LAYERS=0 BF16_LAST_LAYERS=1: contradict FP8_PARAMS=1 and FP4_PARAMS=1",
        ),
        ({"OP_FUSER": "1", "TP": "4"}, "OP_FUSER=1: needs TP=1, not 4"),
        ({"OP_FUSER": "1", "TP": "1", "SP": "0", "RECOMPUTE": "full"}, "OP_FUSER=1: contradicts RECOMPUTE"),
        (
            {"OP_FUSER": "1", "TP": "1", "FP4": "1", "FP4_HEAL_STEP": "3", "ACCELERATOR": "B200"},
            "OP_FUSER=1: contradicts FP4_HEAL_STEP=3",
        ),
        ({"OP_FUSER": "1", "TP": "1", "PLATFORM": "cpu"}, "OP_FUSER=1: needs PLATFORM=gpu"),
        ({"CROSS_ENTROPY": "te", "PLATFORM": "cpu"}, "CROSS_ENTROPY=te: needs PLATFORM=gpu"),
        ({"OFFLOAD_DOUBLE_BUFFER": "1"}, "OFFLOAD_DOUBLE_BUFFER=1: needs CPU_OFFLOAD_LAYERS"),
        ({"FP8": "1", "FP8_DPA": "1", "FP8_RECIPE": "tensorwise"}, "FP8_DPA=1: needs FP8_RECIPE=delayed"),
        ({"MAX_SEQLEN": "4096"}, "MAX_SEQLEN=4096: is fixed by the closed division; set it to 8192"),
        ({"GRADIENT_CLIP_NORM": "1"}, "GRADIENT_CLIP_NORM=1.0: is fixed by the closed division; set it to 0.3"),
        ({"WEIGHT_DECAY": "0"}, "WEIGHT_DECAY=0.0: is fixed by the closed division"),
        ({"LORA_RANK": "8"}, "LORA_RANK=8: is fixed by the closed division"),
        ({"LORA_ALPHA": "16"}, "LORA_ALPHA=16: is fixed by the closed division"),
        ({"LORA_DROPOUT": "0"}, "LORA_DROPOUT=0.0: is fixed by the closed division"),
        ({"TARGET_LOSS": "0.93"}, "TARGET_LOSS=0.93: is fixed by the closed division"),
        ({"EVAL_EVERY_SEQUENCES": "96"}, "EVAL_EVERY_SEQUENCES=96: is fixed by the closed division"),
        ({"EVAL_SKIP": "0"}, "EVAL_SKIP=0: is fixed by the closed division; unset it or MLPERF_DIVISION=open"),
        ({"OBSERVE_NSYS": "100"}, "OBSERVE_NSYS=100: must be FIRST-LAST, such as 100-104"),
        ({"OBSERVE_PROFILE": "9-8"}, "OBSERVE_PROFILE=9-8: must be FIRST-LAST"),
        ({"OBSERVE_PROFILE": "799-801"}, "OBSERVE_PROFILE=799-801: must end at MAX_STEPS=800 at the latest"),
        ({"OBSERVE_RANKS": "0,8"}, "OBSERVE_RANKS=0,8: must be ranks below 8"),
        ({"OBSERVE_RANKS": "all"}, "OBSERVE_RANKS=all: must be ranks below 8"),
        ({"OBSERVE_NSYS": "1-2", "OBSERVE_PROFILE": "1-2"}, "OBSERVE_PROFILE=1-2: contradicts OBSERVE_NSYS"),
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


def test_page_of_settings_is_made_from_the_fields() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    assert page == settings_page(), "run: PYTHONPATH=src python -m llama2_lora.config.page > docs/settings.md"
