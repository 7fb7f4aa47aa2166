"""The forecast against published times, and what it must do whatever the constants."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import ModuleType

import pytest

from helpers import ROOT
from llama2_lora.forecast.timing import (
    EVAL_ERROR,
    FITTED,
    HELD_OUT_ERROR,
    UNSEEN_ERROR,
    Interval,
    Work,
    error_of,
    eval_seconds,
    forecast,
    forward_flop,
    step_seconds,
)
from llama2_lora.gpus import ACCELERATORS
from llama2_lora.llama2 import LLAMA2_70B

H100 = Work(accelerator=ACCELERATORS["H100"], gpus=8, minibs=4, tp=4)


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_timing", ROOT / "benchmarks" / "fit_timing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flop_of_a_sequence() -> None:
    """2 * 8192 * 68.713e9 linear weights; attention 2 * 8192^2 * 8192 * 80; about 2,600 TFLOP with the backward."""
    linear, attention = forward_flop(LLAMA2_70B, 8192)
    assert linear / 1e12 == pytest.approx(1125.8, rel=1e-3)
    assert attention / 1e12 == pytest.approx(87.96, rel=1e-3)
    assert attention / (linear + attention) == pytest.approx(0.07, abs=0.005)
    assert (2 * linear + 3.5 * attention) / 1e12 == pytest.approx(2598, rel=0.03)  # NVIDIA's own figure


def test_constants_are_what_the_fit_gives(fitting: ModuleType) -> None:
    pytest.importorskip("scipy")
    again = fitting.fit(fitting.split(fitting.read_rows())["fit"])
    assert again.efficiency == pytest.approx(FITTED.efficiency, rel=0.01)
    for name in ("tp_exposed", "cp_layer_seconds", "stragglers", "eval_share", "eval_fixed_seconds"):
        assert getattr(again, name) == pytest.approx(getattr(FITTED, name), rel=0.02), name


def test_stated_error_is_the_error_on_what_the_fit_did_not_see(fitting: ModuleType) -> None:
    parts = fitting.split(fitting.read_rows())
    assert {row["submitter"] for row in parts["fit"]}.isdisjoint(row["submitter"] for row in parts["held out"])
    assert len(parts["held out"]) == 47
    for family, errors in fitting.errors_by_class(parts["held out"], FITTED).items():
        assert fitting.root_mean_square(errors) <= HELD_OUT_ERROR[family], family
    evals = [fitting.eval_error(row, FITTED) for row in parts["held out"]]
    assert fitting.root_mean_square(evals) <= EVAL_ERROR
    runs = [fitting.run_error(row, FITTED) for row in parts["held out"]]
    assert fitting.root_mean_square(runs) < 0.085


def test_nine_of_ten_held_out_steps_lie_in_their_interval(fitting: ModuleType) -> None:
    rows = fitting.split(fitting.read_rows())["held out"]
    inside = 0
    for row in rows:
        bounds = forecast(fitting.work_of(row), 3072, 5)["step_seconds"]
        inside += bounds.low <= float(row["step_seconds"]) <= bounds.high
    assert inside >= 0.9 * len(rows)


def test_fp4_is_extrapolated_within_the_wide_interval(fitting: ModuleType) -> None:
    rows = [row for row in fitting.read_rows() if row["precision"] == "fp4"]
    assert len(rows) == 4
    for row in rows:
        bounds = forecast(fitting.work_of(row), 3072, 5)["step_seconds"]
        assert bounds.low < float(row["step_seconds"]) < bounds.high


def test_known_run() -> None:
    """Published: 3.69 s a step, 36 s an evaluation, 27.5 minutes with 3,226 sequences and 5.4 evaluations."""
    values = forecast(H100, 3226, 5.4)
    assert values["step_seconds"].low < 3.69 < values["step_seconds"].high
    assert values["eval_seconds"].low < 36 < values["eval_seconds"].high
    assert values["run_minutes"].low < 27.5 < values["run_minutes"].high


def test_time_adds_up() -> None:
    values = forecast(H100, 800, 2)
    seconds = 100 * step_seconds(H100) + 2 * eval_seconds(H100)
    assert values["run_minutes"].middle == pytest.approx(seconds / 60)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"precision": "bf16"}, {"precision": "fp8"}),
        ({"accelerator": ACCELERATORS["H100"], "tp": 1}, {"accelerator": ACCELERATORS["H200"], "tp": 1}),
        ({"accelerator": ACCELERATORS["H200"]}, {"accelerator": ACCELERATORS["B200"]}),
        ({"accelerator": ACCELERATORS["B200"]}, {"accelerator": ACCELERATORS["B200"], "precision": "fp4"}),
        ({"recompute": True}, {}),
        ({"minibs": 8}, {"minibs": 4}),
        ({"pp": 2, "tp": 4}, {"tp": 8}),  # a bubble, with the same number of GPUs a replica
    ],
)
def test_order(slower: dict, faster: dict) -> None:
    assert step_seconds(replace(H100, **slower)) > step_seconds(replace(H100, **faster))


def test_what_no_published_run_did_has_a_wide_interval() -> None:
    assert error_of(H100) == HELD_OUT_ERROR["Hopper"] < UNSEEN_ERROR
    for change in ({"precision": "bf16"}, {"pp": 2}, {"recompute": True}, {"accelerator": ACCELERATORS["MI355X"]}):
        assert error_of(replace(H100, **change)) == UNSEEN_ERROR


def test_interval_is_symmetric_in_the_logarithm() -> None:
    bounds = Interval.around(10.0, 0.1)
    assert bounds.low * bounds.high == pytest.approx(100)
    assert bounds.high == pytest.approx(11.788, rel=1e-3)  # exp(0.1645)
