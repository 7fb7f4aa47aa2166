"""The same run in the dialects of published logs, and what its figures must be in each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.run_text import CONVERGING, START_MS, line, run_lines
from llama2_lora.judge.checks import judge
from llama2_lora.judge.run import Run

FP4 = (0.957, 0.951, 0.9465, 0.9435, 0.924)  # v5.1, GBS 8: high until the change to FP8, after 2,800 sequences


def read(folder: Path, lines: list[str], ruleset: str = "5.1.0") -> Run:
    (folder / "a_1.log").write_text("\n".join(lines) + "\n")
    (run,) = judge(folder, ruleset).runs
    return run


def codes(run: Run) -> list[str]:
    return [finding.code for finding in run.findings]


def changed(lines: list[str], change: Any) -> list[str]:
    """Each event of a log through `change`, which gets and returns its fields."""
    events = [json.loads(text.removeprefix(":::MLLOG ")) for text in lines]
    return [":::MLLOG " + json.dumps(event) for event in map(change, events) if event]


def v51(lines: list[str], every: int = 384) -> list[str]:
    """block_start and block_stop count the block alone; the training loss stands inside tracked_stats."""
    first = True

    def change(event: dict[str, Any]) -> dict[str, Any]:
        nonlocal first
        if event["key"] == "train_loss":
            return event | {"key": "tracked_stats", "value": {"train_loss": event["value"]}}
        if event["key"] in ("block_start", "block_stop"):
            event["metadata"]["samples_count"] = 1536 if first else every
            first = first and event["key"] == "block_start"
        return event

    return changed(lines, change)


def v41(lines: list[str]) -> list[str]:
    """block_stop counts the sequences so far; there is no training loss."""
    position = 0

    def change(event: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal position
        if event["key"] == "block_stop":
            position = 1536 if position == 0 else position + 384
            event["metadata"]["samples_count"] = position
        return None if event["key"] == "train_loss" else event

    return changed(lines, change)


def nested(lines: list[str]) -> list[str]:
    """One block around everything, evaluations inside it; run_stop ends the last stretch."""
    starts = [i for i, text in enumerate(lines) if '"block_start"' in text]
    stops = [i for i, text in enumerate(lines) if '"block_stop"' in text]
    dropped = {*starts[1:], *stops[:-1]}
    return [text for i, text in enumerate(lines) if i not in dropped]


def epochs(lines: list[str]) -> list[str]:
    return [text.replace('"block_st', '"epoch_st') for text in lines]


DIALECTS = {"v5.0": list, "v5.1": v51, "v4.1": v41, "nested": nested, "epochs": epochs}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_figures_are_the_same_in_every_dialect(tmp_path: Path, dialect: str) -> None:
    """384 steps of 8 sequences at 4 s: 2 sequences/s; eight H100 with 989 TFLOP/s."""
    run = read(tmp_path, DIALECTS[dialect](run_lines()))
    assert run.samples_per_second == pytest.approx(2.0, rel=5e-3)
    assert run.step_seconds == pytest.approx(4.0, rel=5e-3)
    assert run.mfu() == pytest.approx(0.6567, rel=5e-3)
    assert [block.sequences for block in run.blocks] == [1536, 384, 384, 384, 384]
    assert run.eval_seconds == pytest.approx(200)
    assert "impossible MFU" not in codes(run)


@pytest.mark.parametrize("dialect", ["v5.0", "v5.1", "v4.1"])
def test_last_block_without_an_evaluation(tmp_path: Path, dialect: str) -> None:
    """A job that was killed after it had trained, before it had evaluated."""
    lines = DIALECTS[dialect](run_lines())
    stop = max(i for i, text in enumerate(lines) if '"block_stop"' in text)
    run = read(tmp_path, lines[: stop + 1])
    assert run.samples_per_second == pytest.approx(2.0, rel=5e-3)
    assert len(run.blocks) == (4 if dialect == "v5.0" else 5)  # v5.0's block_stop repeats its block_start


def test_a_run_that_run_stop_ends(tmp_path: Path) -> None:
    """No evaluation after the last block: run_stop says how far it got."""
    lines = [*v51(run_lines())[:-1]]
    end = START_MS + 10_000_000
    lines += [line(end, "block_start", samples_count=384), line(end + 192_000, "block_stop", samples_count=384)]
    lines += [line(end + 192_000, "run_stop", samples_count=3456, status="aborted")]
    run = read(tmp_path, lines)
    assert run.blocks[-1].sequences == 384
    assert run.blocks[-1].seconds == pytest.approx(192)


def test_training_loss_inside_tracked_stats(tmp_path: Path) -> None:
    run = read(tmp_path, v51(run_lines(train_loss=1.31)))
    assert run.train_losses[0] == (96, 1.31)
    assert run.train_loss_factor == 1


@pytest.mark.parametrize("dialect", [list, v51])
@pytest.mark.parametrize("factor", [0.125, 0.5, 1, 2, 4, 8, 64])
@pytest.mark.parametrize("noise", [0.86, 1.0, 1.17])
def test_factor_of_the_training_loss(tmp_path: Path, dialect: Any, factor: float, noise: float) -> None:
    """A power of two, although single losses are up to 17% off the usual 1.3."""
    run = read(tmp_path, dialect(run_lines(train_loss=1.3 * factor * noise)))
    assert run.train_loss_factor == factor
    found = [finding for finding in run.findings if "train loss" in finding.code]
    assert len(found) == (factor != 1)
    if factor != 1:
        assert (f"{factor:g} times" if factor > 1 else f"1/{1 / factor:g} of") in found[0].text
        assert run.complied


def test_high_losses_at_the_start_are_no_factor(tmp_path: Path) -> None:
    """2.2 after ten steps, 1.3 later, as every run does."""
    lines = run_lines()[:40]
    early = [i for i, text in enumerate(lines) if '"value": 1.3' in text][:2]
    run = read(tmp_path, [text.replace("1.3", "2.2") if i in early else text for i, text in enumerate(lines)])
    assert run.train_loss_factor == 1


def test_a_run_that_diverged_has_no_factor(tmp_path: Path) -> None:
    run = read(tmp_path, run_lines(losses=(4.9, 5.2), train_loss=5.1))
    assert run.train_loss_factor is None


def test_impossible_utilization_is_said(tmp_path: Path) -> None:
    """A dialect that we read wrongly, or a system that is not what it says: 2 sequences/s on two H100."""
    run = read(tmp_path, run_lines(config_filename="config_H100_1x2x4.sh"))
    assert run.mfu() == pytest.approx(2.63, abs=0.01)
    assert "impossible MFU" in codes(run)
    assert run.complied


# ---- FP4 -------------------------------------------------------------------------------------------------------------


def healed(lines: list[str], slower: float = 1.6) -> list[str]:
    """From the last block on, training and evaluation take `slower` times as long: FP8 after FP4."""
    times = [json.loads(text.removeprefix(":::MLLOG "))["time_ms"] for text in lines]
    turn = times[max(i for i, text in enumerate(lines) if '"block_start"' in text)]

    def change(event: dict[str, Any]) -> dict[str, Any]:
        late = max(0, event["time_ms"] - turn)
        return event | {"time_ms": event["time_ms"] + late * (slower - 1)}

    return changed(lines, change)


def test_fp4_runs_are_compared_with_fp4_runs(tmp_path: Path) -> None:
    run = read(tmp_path, healed(run_lines(losses=FP4, lowest_numerical_precision_in_linear=None)))
    assert run.precision == "fp4"
    assert "slow convergence" not in codes(run)
    assert abs(run.published_difference() or 0) < 1e-3


def test_a_run_in_fp8_with_such_losses_is_slow(tmp_path: Path) -> None:
    run = read(tmp_path, run_lines(losses=FP4, lowest_numerical_precision_in_linear=None))
    assert run.precision is None
    assert "slow convergence" in codes(run)


def test_one_slow_block_is_no_healing(tmp_path: Path) -> None:
    lines = run_lines(lowest_numerical_precision_in_linear=None)
    stop = [i for i, text in enumerate(lines) if '"block_stop"' in text][2]
    late = [re.sub(r'"time_ms": (\d+)', lambda m: f'"time_ms": {int(m[1]) + 300_000}', text) for text in lines[stop:]]
    assert read(tmp_path, lines[:stop] + late).precision is None


@pytest.mark.parametrize(
    ("said", "known"), [("nvfp4", "fp4"), ("mxfp8", "fp8"), ("FP8", "fp8"), ("bfloat16", "bf16"), ("?", None)]
)
def test_precision_and_parallelism_of_ruleset_6(tmp_path: Path, said: str, known: str | None) -> None:
    run = read(tmp_path, run_lines(lowest_numerical_precision_in_linear=said), "6.0.0")
    assert run.precision == known
    assert run.parallelism == {"TP": 4, "PP": 1, "CP": 1, "EP": 1}


# ---- Order and rounds ------------------------------------------------------------------------------------------------


def test_lines_of_many_nodes_may_be_out_of_order(tmp_path: Path) -> None:
    lines = run_lines()
    nodes = [line(START_MS - shift, "cache_clear", True) for shift in (5, 900, 2, 700)]
    starts = [line(START_MS - shift, "init_start") for shift in (1, 300)]
    assert codes(read(tmp_path, [*nodes, *starts, *lines])) == []


@pytest.mark.parametrize(
    ("day_ms", "said"), [(1_727_546_022_000, True), (1_715_000_000_000, True), (1_745_000_000_000, False), (START_MS, False)]
)
def test_logs_of_early_rounds_say_so(tmp_path: Path, day_ms: int, said: bool) -> None:
    """v4.0 and v4.1 by their date, 28 September 2024 and 6 May 2024; not April 2025."""
    shift = day_ms - START_MS
    lines = changed(run_lines(), lambda event: event | {"time_ms": event["time_ms"] + shift})
    run = read(tmp_path, lines)
    assert ("other round" in codes(run)) == said
    assert run.complied
    assert run.samples_per_second == pytest.approx(2.0)


def test_early_rulesets_can_be_asked_for(tmp_path: Path) -> None:
    shift = 1_727_546_022_000 - START_MS
    run = read(tmp_path, changed(run_lines(), lambda event: event | {"time_ms": event["time_ms"] + shift}), "4.1.0")
    assert codes(run) == []
    assert run.compliance == []
    assert [loss for _, loss in run.evaluations] == list(CONVERGING)
