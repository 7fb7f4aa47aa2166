#!/usr/bin/env python3
"""Fit the constants of timing.py to published results, and judge the fit on systems that it did not see.

    python benchmarks/fit_timing.py

published_results.csv: MLPerf Training v4.1 to v5.1 (of v5.1 half the entries), llama2_70b_lora, closed division; one line an
entry, times from its logs; lines without an evaluation time, v6.0 among them, are headline figures. `minibs` is the logged
gradient accumulation; tp and cp come from the configuration that the entry names ("stated") or from GPUs * minibs / GBS and
what others ran on that part ("inferred").

The error is that of cross-validation by system: for each submitter and part all entries are left out, the rest is fitted, and
the entries that were left out are forecast. Entries whose family and generation nobody else has cannot be judged so; they are
counted. FP4 entries are few and of two phases: their efficiency is solved for from the mean step, each family for itself.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2_lora.forecast.timing import (
    HEAL_SEQUENCES,
    HELD_OUT_ERROR,
    NORMAL_90,
    Constants,
    Work,
    eval_seconds,
    training_seconds,
)
from llama2_lora.gpus import ACCELERATORS

Row = dict[str, str]
BY_GENERATION = ("Blackwell", "MI300X", "MI325X")  # families whose steps changed between the rounds
TERMS = {  # name: start, most, scale
    "tp_exposed": (0.5, 3.0, 0.5),
    "cp_layer_seconds": (3e-4, 5e-3, 1e-4),
    "amd_layer_seconds": (2e-3, 2e-2, 1e-3),
    "near_stragglers": (0.02, 0.2, 1e-2),
    "far_stragglers": (0.03, 0.2, 1e-2),
}
NO_EVALUATION: dict[str, Any] = {"eval_share": 1.0, "eval_fixed_seconds": 0.0, "eval_least_seconds": {"": 0.0}}
ROBUST = 0.05  # log error above which an entry counts less: one of 103 is off by 34%


def read_rows() -> list[Row]:
    with Path(__file__).with_name("published_results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def kind(row: Row) -> str:
    """Key of the efficiency."""
    family = ACCELERATORS[row["accelerator"]].family
    end = " fp4" if row["precision"] == "fp4" else ""
    return f"{family} {min(row['round'], 'v5.1')}{end}" if family in BY_GENERATION and not end else family + end


def work_of(row: Row) -> Work:
    return Work(
        accelerator=ACCELERATORS[row["accelerator"]],
        gpus=int(row["nodes"]) * int(row["gpus_per_node"]),
        minibs=int(row["minibs"]),
        tp=int(row["tp"]),
        cp=int(row["cp"]),
        precision=row["precision"],
        generation=min(row["round"], "v5.1"),
    )


def step_error(row: Row, constants: Constants) -> float:
    """Of the mean step over the run, healing and all."""
    work, sequences = work_of(row), float(row["sequences"] or HEAL_SEQUENCES)  # headline figures are of the first phase
    seconds = training_seconds(work, sequences, constants) * work.gbs / sequences
    return math.log(seconds / float(row["step_seconds"]))


def eval_error(row: Row, constants: Constants) -> float:
    return math.log(eval_seconds(work_of(row), constants) / float(row["eval_seconds"]))


def run_error(row: Row, constants: Constants) -> float:
    """Of the time to train, given the sequences and evaluations that the entry took on average."""
    seconds = training_seconds(work_of(row), float(row["sequences"]), constants)
    seconds += float(row["evaluations"]) * eval_seconds(work_of(row), constants)
    return math.log(seconds / 60 / float(row["run_minutes"]))


def fit(rows: list[Row]) -> Constants:
    """All constants. FP8 entries first; evaluations and FP4 with the others held."""
    constants = fit_steps([row for row in rows if row["precision"] == "fp8"])
    constants = fit_evaluations([row for row in rows if row["precision"] == "fp8" and row["eval_seconds"]], constants)
    fp4: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["precision"] == "fp4":
            fp4[kind(row)].append(row)
    return replace(constants, efficiency=constants.efficiency | {name: solve(name, of, constants) for name, of in fp4.items()})


def fit_steps(rows: list[Row]) -> Constants:
    from scipy.optimize import least_squares

    kinds = sorted({kind(row) for row in rows})

    def constants(x: Iterable[float]) -> Constants:
        x = [float(value) for value in x]
        terms = dict(zip(TERMS, x[len(kinds) :], strict=True))
        return Constants(
            dict(zip(kinds, x[: len(kinds)], strict=True)),
            **terms,
            eval_share=1.0,
            eval_fixed_seconds=0.0,
            eval_least_seconds={"": 0.0},
        )

    start, most, scale = zip(*[(0.5, 1.0, 0.1)] * len(kinds), *TERMS.values(), strict=True)
    lowest = [0.1] * len(kinds) + [0.0] * len(TERMS)
    found = least_squares(
        lambda x: [step_error(row, constants(x)) for row in rows],
        start,
        bounds=(lowest, most),
        x_scale=scale,
        loss="soft_l1",
        f_scale=ROBUST,
    )
    return constants(found.x)


def fit_evaluations(rows: list[Row], constants: Constants) -> Constants:
    from scipy.optimize import least_squares

    def changed(y: Iterable[float]) -> Constants:
        share, fixed, hopper, other = (float(value) for value in y)
        least = {"Hopper": hopper, "": other}
        return replace(constants, eval_share=share, eval_fixed_seconds=fixed, eval_least_seconds=least)

    found = least_squares(
        lambda y: [eval_error(row, changed(y)) for row in rows],
        [1.0, 0.05, 0.35, 0.05],
        bounds=([0.1, 0.0, 0.0, 0.0], [3.0, 5.0, 1.0, 1.0]),
        loss="soft_l1",
        f_scale=0.1,
        diff_step=1e-3,
        max_nfev=40,
    )
    return changed(found.x)


def solve(name: str, rows: list[Row], constants: Constants) -> float:
    """The FP4 efficiency at which the mean log error of these entries is zero."""
    low, high = 0.05, 2.0
    for _ in range(50):
        middle = math.sqrt(low * high)
        trial = replace(constants, efficiency=constants.efficiency | {name: middle})
        slow = sum(step_error(row, trial) for row in rows) > 0
        low, high = (middle, high) if slow else (low, middle)
    return middle


# ---- Cross-validation ------------------------------------------------------------------------------------------------


def left_out(rows: list[Row]) -> dict[str, list[tuple[Row, Constants]]]:
    """Each entry with constants that saw no entry of its submitter on its part, by family (and fp4); "alone": none such."""
    found: dict[str, list[tuple[Row, Constants]]] = defaultdict(list)
    systems: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        systems[row["submitter"], row["accelerator"]].append(row)
    for members in systems.values():
        rest = [row for row in rows if not any(row is member for member in members)]
        known = {kind(row) for row in rest}
        constants = fit(rest)
        for row in members:
            family = ACCELERATORS[row["accelerator"]].family
            name = "fp4" if row["precision"] == "fp4" else family
            found[name if kind(row) in known else "alone"].append((row, constants))
    return dict(found)


def quantile(errors: list[float], share: float) -> float:
    """Of absolute errors, linear between them."""
    ordered = sorted(map(abs, errors))
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def errors(entries: list[tuple[Row, Constants]], error: Callable[[Row, Constants], float], column: str) -> list[float]:
    return [error(row, constants) for row, constants in entries if row[column]]


def inside(entries: list[tuple[Row, Constants]], family: str) -> int:
    """How many of the left-out steps lie in their interval."""
    return sum(abs(step_error(row, constants)) <= NORMAL_90 * HELD_OUT_ERROR.get(family, 0.0) for row, constants in entries)


def main() -> int:
    rows = read_rows()
    print(fit(rows))
    out = left_out(rows)
    alone = out.pop("alone", [])
    for family, entries in sorted(out.items()):
        found = errors(entries, step_error, "step_seconds")
        text = f"median {quantile(found, 0.5):.1%}, p90 {quantile(found, 0.9):.1%}, worst {max(map(abs, found)):.1%}"
        print(f"{family}: step, {len(found)} left out: {text}; {inside(entries, family)} in the interval")
    everything = [entry for entries in out.values() for entry in entries]
    for what, error, column in (
        ("step", step_error, "step_seconds"),
        ("evaluation", eval_error, "eval_seconds"),
        ("time to train", run_error, "run_minutes"),
    ):
        found = errors(everything, error, column)
        print(f"all: {what}, {len(found)} left out: median {quantile(found, 0.5):.1%}, p90 {quantile(found, 0.9):.1%}")
    newest = [entry for entry in everything if entry[0]["round"] >= "v5.1"]
    found = errors(newest, step_error, "step_seconds")
    print(f"v5.1 and later: step, {len(found)} left out: median {quantile(found, 0.5):.1%}, p90 {quantile(found, 0.9):.1%}")
    print("nobody else has: " + ", ".join(f"{row['round']} {row['system']}" for row, _ in alone))
    constants = fit(rows)
    for row in rows:
        if abs(off := step_error(row, constants)) > 0.08:
            print(f"  {row['round']} {row['submitter']} {row['system']} ({row['precision']}): {off:+.1%} though fitted")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
