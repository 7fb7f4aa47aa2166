"""The same numbers under every layout, dropout on: 20 steps, four evaluations and all adapter gradients are one rank's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny

TOLERANCE = 1e-5
STEPS = 20
TWO_RANKS = {
    "dp2": {"MINIBS": "4"},
    "tp2": {"TP": "2"},
    "tp2_sp": {"TP": "2", "SP": "1"},
    "tp2_sp_overlap": {"TP": "2", "SP": "1", "TP_COMM_OVERLAP": "1"},
    "pp2": {"PP": "2"},
    # Layers run again when later micro-batches have begun: their dropout masks must be those of their own.
    "pp2_recompute": {"PP": "2", "RECOMPUTE": "full"},
    "cp2_ring": {"CP": "2"},
    "cp2_all_to_all": {"CP": "2", "CP_COMM": "a2a"},
    "cp2_gathered": {"CP": "2", "CP_COMM": "all_gather"},
    # Evaluation without context parallelism, a row at a time; the warm-up's too.
    "cp2_whole": {"CP": "2", "VAL_CP": "1", "VAL_MBS": "1", "WARMUP_VALIDATION_STEPS": "1"},
}
FOUR_RANKS = {
    "tp2_sp_cp2": {"TP": "2", "SP": "1", "CP": "2"},
    "tp2_sp_cp2_overlap": {"TP": "2", "SP": "1", "CP": "2", "TP_COMM_OVERLAP": "1"},
    "pp2_cp2": {"PP": "2", "CP": "2"},
    "cp4_ring": {"CP": "4"},
    "tp2_sp_dp2": {"MINIBS": "4", "TP": "2", "SP": "1"},
}
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "40", "MINIBS": "8"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def one_rank(tiny: Tiny, results: Path) -> Done:
    return run_many(tiny, results / "1", {"one": {}}, 1, **SHORT)["one"]


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, results: Path) -> dict[str, Done]:
    return run_many(tiny, results / "2", TWO_RANKS, 2, **SHORT)


@pytest.fixture(scope="module")
def four_ranks(tiny: Tiny, results: Path) -> dict[str, Done]:
    return run_many(tiny, results / "4", FOUR_RANKS, 4, **SHORT)


def assert_same(run: Done, one: Done) -> None:
    for key, expected in one.losses().items():
        assert run.losses()[key] == pytest.approx(expected, abs=TOLERANCE)
    gradients, wanted = run.gradients(0), one.gradients(0)
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        assert gradients[name].shape == wanted[name].shape
        assert np.abs(gradients[name] - wanted[name]).max() < TOLERANCE, name


def test_one_rank_learns(one_rank: Done) -> None:
    """Without this the comparisons could compare runs that do nothing."""
    train, evaluation = one_rank.losses()["train_loss"], one_rank.losses()["eval_accuracy"]
    assert len(train) == len(set(train)) == STEPS
    assert len(evaluation) == 4
    assert evaluation[-1] < evaluation[0] - 0.1
    gradients = one_rank.gradients(0)
    assert len(gradients) == 2 * 2 * 2  # layers, targets, A and B
    assert all(len(steps) == STEPS and np.abs(steps[-1]).max() > 1e-4 for steps in gradients.values())


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_train_as_one(layout: str, two_ranks: dict[str, Done], one_rank: Done) -> None:
    assert_same(two_ranks[layout], one_rank)


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_train_as_one(layout: str, four_ranks: dict[str, Done], one_rank: Done) -> None:
    assert_same(four_ranks[layout], one_rank)
