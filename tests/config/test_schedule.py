"""Tables worked out by hand: the rules' evaluation steps and the cosine."""

from __future__ import annotations

import math

import pytest

from llama2_lora.config import schedule

# GBS: skipped evaluations, steps between evaluations, step of the first one, its sequences, sequences between two
EVALUATION_TABLE = {
    8: (3, 48, 192, 1536, 384),
    9: (3, 43, 172, 1548, 387),
    16: (4, 24, 120, 1920, 384),
    18: (4, 22, 110, 1980, 396),
    32: (6, 12, 84, 2688, 384),
    64: (10, 6, 66, 4224, 384),
    72: (11, 6, 72, 5184, 432),
    128: (18, 3, 57, 7296, 384),
}


@pytest.mark.parametrize("gbs", EVALUATION_TABLE)
def test_evaluation_schedule(gbs: int) -> None:
    skip, every, first, first_sequences, spacing = EVALUATION_TABLE[gbs]
    assert schedule.skipped_evaluations(gbs) == skip
    assert schedule.eval_every_steps(gbs) == every
    assert schedule.first_eval_step(gbs) == first
    assert first * gbs == first_sequences
    steps = list(schedule.eval_steps(gbs, max_steps=first + 2 * every))
    assert steps == [first, first + every, first + 2 * every]
    assert (steps[1] - steps[0]) * gbs == spacing


def test_evaluation_ends_with_the_run() -> None:
    assert list(schedule.eval_steps(8, max_steps=191)) == []
    assert list(schedule.eval_steps(8, max_steps=239)) == [192]
    assert list(schedule.eval_steps(8, max_steps=240)) == [192, 240]


def test_open_division_may_change_the_cadence() -> None:
    assert list(schedule.eval_steps(8, max_steps=10, every_sequences=16, skip=0)) == [2, 4, 6, 8, 10]
    assert list(schedule.eval_steps(8, max_steps=10, every_sequences=20, skip=1)) == [6, 9]  # ceil(20 / 8) = 3


@pytest.mark.parametrize(
    ("nodes", "gpus", "tp", "pp", "cp", "dp"),
    [(1, 8, 4, 1, 1, 2), (8, 8, 4, 1, 2, 8), (1, 8, 1, 1, 2, 4), (128, 8, 4, 1, 2, 128), (1, 2, 1, 1, 1, 2)],
)
def test_data_parallel_size(nodes: int, gpus: int, tp: int, pp: int, cp: int, dp: int) -> None:
    assert schedule.data_parallel_size(nodes, gpus, tp, pp, cp) == dp


def test_data_parallel_size_names_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"TP\*PP\*CP=3\*1\*1=3: must divide DGXNNODES\*DGXNGPU=1\*8=8"):
        schedule.data_parallel_size(1, 8, 3, 1, 1)


def test_learning_rate_by_hand() -> None:
    # cos(0) = 1, cos(pi/3) = 1/2, cos(pi/2) = 0, cos(2pi/3) = -1/2, cos(pi) = -1
    expected = {0: 4e-4, 200: 3e-4, 300: 2e-4, 400: 1e-4, 600: 0.0, 700: 0.0}
    for step, lr in expected.items():
        assert schedule.learning_rate(step, 4e-4, 600) == pytest.approx(lr, abs=1e-18)


def test_learning_rate_of_a_published_log() -> None:
    # NVIDIA v5.0, GBS 8, LR 5e-4, 800 steps: the log says 0.0004998072590601808 at 80 sequences = 10 steps
    assert schedule.learning_rate(10, 5e-4, 800) == pytest.approx(0.0004998072590601808, rel=1e-12)


def test_learning_rate_warm_up() -> None:
    # four steps up: 1/5, 2/5, 3/5, 4/5 of the base, then the cosine's start
    rates = [schedule.learning_rate(step, 1.0, 104, warmup_steps=4) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.learning_rate(54, 1.0, 104, warmup_steps=4) == pytest.approx(0.5)
    assert math.isclose(schedule.learning_rate(104, 1.0, 104, warmup_steps=4), 0.0)
