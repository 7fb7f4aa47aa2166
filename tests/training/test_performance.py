"""Every setting of the Performance group changes speed or memory and nothing else: 20 steps with it are 20 steps without it."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import ROOT
from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny
from llama2_lora.config.settings import GROUPS

TOLERANCE = 1e-5
STEPS = 20
ONE_RANK = {
    "recompute_selective": {"RECOMPUTE": "selective"},
    "recompute_full": {"RECOMPUTE": "full"},
    "offload": {"CPU_OFFLOAD_LAYERS": "1"},
    "warmup": {"WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "2"},
    "quiet_log": {"LOG_EVERY_STEPS": "5"},
    "graphs_layer": {"CUDA_GRAPHS": "layer", "WARMUP_TRAIN_STEPS": "2"},
    "graphs_iteration": {"CUDA_GRAPHS": "iteration", "WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "2"},
}
PIPELINE = {
    "pp_recompute_selective": {"PP": "2", "RECOMPUTE": "selective"},
    "pp_recompute_full": {"PP": "2", "RECOMPUTE": "full"},
}
OVERLAP = {
    "overlap": {"TP_COMM_OVERLAP": "1"},
    "overlap_recompute_full": {"TP_COMM_OVERLAP": "1", "RECOMPUTE": "full"},
}
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "40", "LORA_DROPOUT": "0", "MINIBS": "8"}


@pytest.fixture(scope="module")
def one_rank(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    runs = {"plain": {}, "golden": {"LORA_DROPOUT": ""}} | ONE_RANK
    return run_many(tiny, tmp_path_factory.mktemp("one"), runs, 1, **SHORT)


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    sequence_parallel = {"TP": "2", "SP": "1"}
    runs = {"pp": {"PP": "2"}} | PIPELINE | {"sp": sequence_parallel}
    runs |= {name: sequence_parallel | options for name, options in OVERLAP.items()}
    return run_many(tiny, tmp_path_factory.mktemp("two"), runs, 2, **SHORT)


def assert_same(run: Done, plain: Done, ranks: int, every: int = 1) -> None:
    expected, losses = plain.losses(), run.losses()
    assert losses["train_loss"] == pytest.approx(expected["train_loss"][every - 1 :: every], abs=TOLERANCE)
    assert losses["eval_accuracy"] == pytest.approx(expected["eval_accuracy"], abs=TOLERANCE)
    for rank in range(ranks):
        gradients, wanted = run.gradients(rank), plain.gradients(rank)
        assert gradients.keys() == wanted.keys()
        for name in wanted:
            assert np.abs(gradients[name] - wanted[name]).max() < TOLERANCE, name


def test_the_plain_run_learns(one_rank: dict[str, Done]) -> None:
    """Without this the comparisons could compare runs that do nothing."""
    plain = one_rank["plain"]
    losses, gradients = plain.losses(), plain.gradients(0)
    assert len(losses["train_loss"]) == STEPS
    assert losses["eval_accuracy"][-1] < losses["eval_accuracy"][0] - 0.1
    assert len(gradients) == 2 * 2 * 2  # layers, targets, A and B
    assert all(len(steps) == STEPS and np.abs(steps[-1]).max() > 1e-4 for steps in gradients.values())


def test_the_golden_losses_are_reproduced(one_rank: dict[str, Done]) -> None:
    """tests/golden/losses_cpu.txt: a change reproduces it, or is committed with a new one and the reason.

    The run has what users get: dropout, seed 1. A new file is what the assertion shows.
    """
    losses = one_rank["golden"].losses()
    curve = "".join(f"{key} {loss:.6f}\n" for key, values in losses.items() for loss in values)
    golden = (ROOT / "tests/golden/losses_cpu.txt").read_text()
    assert [line.split()[0] for line in curve.splitlines()] == [line.split()[0] for line in golden.splitlines()], curve
    for line, expected in zip(curve.splitlines(), golden.splitlines(), strict=True):
        assert float(line.split()[1]) == pytest.approx(float(expected.split()[1]), abs=1e-4), curve


@pytest.mark.parametrize("option", ONE_RANK)
def test_an_option_changes_nothing(option: str, one_rank: dict[str, Done]) -> None:
    assert_same(one_rank[option], one_rank["plain"], 1, int(ONE_RANK[option].get("LOG_EVERY_STEPS", 1)))


@pytest.mark.parametrize("option", PIPELINE)
def test_an_option_changes_nothing_under_pipeline_parallelism(option: str, two_ranks: dict[str, Done]) -> None:
    assert_same(two_ranks[option], two_ranks["pp"], 2)


@pytest.mark.parametrize("option", OVERLAP)
def test_overlap_changes_nothing(option: str, two_ranks: dict[str, Done]) -> None:
    assert_same(two_ranks[option], two_ranks["sp"], 2)


def test_no_option_is_forgotten() -> None:
    tried = {name for run in (ONE_RANK | PIPELINE | OVERLAP).values() for name in run}
    assert {f.metadata["variable"] for f in GROUPS["performance"].__dataclass_fields__.values()} <= tried
