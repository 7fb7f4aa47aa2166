"""A cluster's config on CPU ranks: what is left of its layout. tests/training/test_reduced.py runs them."""

from __future__ import annotations

import pytest

from helpers import ROOT
from helpers.environments import VALID
from llama2_lora.config.reduced import lines, reduced
from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source


@pytest.mark.parametrize(
    ("config", "name", "layout", "gbs"),
    [
        ("config_DGXB200_1x8x1.sh", "DGXB200_1x8x1_1x2x1", (1, 1, 2), 2),  # nothing but replicas: two of eight
        ("config_DGXH100_1x8x4.sh", "DGXH100_1x8x4_1x2x4", (2, 1, 1), 4),
        ("config_DGXH100_128x8x1.sh", "DGXH100_128x8x1_1x4x1", (2, 2, 1), 1),
        ("config_GB300_18x4x1.sh", "GB300_18x4x1_1x2x1", (1, 2, 1), 1),
    ],
)
def test_layout(config: str, name: str, layout: tuple[int, int, int], gbs: int) -> None:
    exported = source(ROOT / config)
    run = Settings.from_env(exported | reduced(Settings.from_env(exported)))
    assert run.system.name == name
    assert (run.parallel.tp, run.parallel.cp, run.data_parallel_size) == layout
    assert run.global_batch_size == gbs
    assert run.eval_steps.start == 6


@pytest.mark.parametrize(("heal", "steps", "expected"), [("350", "550", "5"), ("350", "700", "4"), ("1", "800", "1")])
def test_healing_keeps_its_share_of_the_run(heal: str, steps: str, expected: str) -> None:
    settings = Settings.from_env(VALID | {"FP4": "1", "FP4_HEAL_STEP": heal, "MAX_STEPS": steps, "ACCELERATOR": "B200"})
    assert reduced(settings)["FP4_HEAL_STEP"] == expected


def test_evaluation_of_whole_rows_stays_one() -> None:
    settings = Settings.from_env(VALID | {"TP": "1", "CP": "8", "VAL_CP": "1"})
    run = Settings.from_env(VALID | {"VAL_CP": "1"} | reduced(settings))
    assert (run.parallel.cp, run.parallel.evaluation_cp) == (2, 1)


def test_graphs_keep_the_warm_up_that_makes_them() -> None:
    graphs = VALID | {"CUDA_GRAPHS": "iteration", "WARMUP_TRAIN_STEPS": "5", "WARMUP_VALIDATION_STEPS": "5"}
    run = Settings.from_env(graphs | reduced(Settings.from_env(graphs)))
    assert (run.performance.warmup_train_steps, run.performance.warmup_validation_steps) == (2, 2)


def test_only_changes_are_printed() -> None:
    found = [*lines(Settings.from_env(VALID | {"WARMUP_TRAIN_STEPS": "1"}))]
    assert "export TP=2 # in place of 4" in found
    assert not [line for line in found if line.startswith(("export CP=", "export WARMUP_", "export FP4_HEAL_STEP"))]
