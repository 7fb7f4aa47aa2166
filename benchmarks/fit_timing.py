#!/usr/bin/env python3
"""Fit the constants of timing.py to published results and judge them on results that the fit did not see.

    python benchmarks/fit_timing.py

published_results.csv: MLPerf Training v4.1 and v5.0, llama2_70b_lora, closed division; one line an entry, times from its
logs. `minibs` is the logged gradient accumulation; tp and cp come from the configuration that the entry names ("stated")
or from GPUs * minibs / GBS and what others ran on that part ("inferred"). The lines of v5.1 are headline figures.

The fit sees the entries of NVIDIA, Dell and AMD, and the judgement everybody else's: other machines, other networks. Not
used for either, but listed: PCIe parts, MangoBoost's several nodes (layout unknown) and FP4 (v5.1), which the model has to
extrapolate to.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

from llama2_lora.forecast.timing import Constants, Work, eval_seconds, step_seconds
from llama2_lora.gpus import ACCELERATORS

FAMILIES = ("Hopper", "Blackwell", "MI300X", "MI325X")
FIT_ON = ("NVIDIA", "Dell", "AMD")
START = [0.5, 0.5, 0.4, 0.4, 0.5, 1e-4, 0.01]


def read_rows() -> list[dict[str, str]]:
    with Path(__file__).with_name("published_results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def work_of(row: dict[str, str]) -> Work:
    return Work(
        accelerator=ACCELERATORS[row["accelerator"].removesuffix("-NVL")],
        gpus=int(row["nodes"]) * int(row["gpus_per_node"]),
        minibs=int(row["minibs"]),
        tp=int(row["tp"]),
        cp=int(row["cp"]),
        precision=row["precision"],
    )


def split(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    parts: dict[str, list[dict[str, str]]] = {"fit": [], "held out": [], "not used": []}
    for row in rows:
        odd = "NVL" in row["accelerator"] or row["precision"] != "fp8"
        odd |= row["submitter"] == "MangoBoost" and row["nodes"] != "1"
        parts["not used" if odd else "fit" if row["submitter"] in FIT_ON else "held out"].append(row)
    return parts


def step_error(row: dict[str, str], constants: Constants) -> float:
    return math.log(step_seconds(work_of(row), constants) / float(row["step_seconds"]))


def eval_error(row: dict[str, str], constants: Constants) -> float:
    return math.log(eval_seconds(work_of(row), constants) / float(row["eval_seconds"]))


def run_error(row: dict[str, str], constants: Constants) -> float:
    """Of the time to train, given the sequences and evaluations that the entry took on average."""
    steps = float(row["sequences"]) / float(row["global_batch_size"])
    seconds = steps * step_seconds(work_of(row), constants)
    seconds += float(row["evaluations"]) * eval_seconds(work_of(row), constants)
    return math.log(seconds / 60 / float(row["run_minutes"]))


def fit(rows: list[dict[str, str]]) -> Constants:
    from scipy.optimize import least_squares

    def constants(x: list[float], share: float = 1.0, fixed: float = 0.0) -> Constants:
        return Constants(dict(zip(FAMILIES, x[:4], strict=True)), *x[4:7], share, fixed)

    low, high = [0.1] * 4 + [0.0] * 3, [1.0] * 4 + [3.0, 5e-3, 0.2]
    scale = [0.1] * 5 + [1e-4, 1e-2]
    steps = least_squares(
        lambda x: [step_error(row, constants(x)) for row in rows], START, bounds=(low, high), x_scale=scale
    ).x.tolist()
    evals = least_squares(
        lambda y: [eval_error(row, constants(steps, *y)) for row in rows], [1.0, 0.2], bounds=([0.1, 0.0], [3.0, 5.0])
    ).x.tolist()
    return constants(steps, *evals)


def root_mean_square(errors: list[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def errors_by_class(rows: list[dict[str, str]], constants: Constants) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[work_of(row).accelerator.family].append(step_error(row, constants))
    return dict(found)


def main() -> int:
    parts = split(read_rows())
    constants = fit(parts["fit"])
    print(constants)
    for name in ("fit", "held out"):
        print(f"{name}: {len(parts[name])} entries; root mean square error of log time")
        for family, errors in sorted(errors_by_class(parts[name], constants).items()):
            worst = max(errors, key=abs)
            print(f"  step, {family}: {root_mean_square(errors):.1%} of {len(errors)}, worst {worst:+.1%}")
        for what, error in (("evaluation", eval_error), ("time to train", run_error)):
            errors = [error(row, constants) for row in parts[name]]
            print(f"  {what}: {root_mean_square(errors):.1%}, worst {max(errors, key=abs):+.1%}")
    for row in parts["held out"] + parts["not used"]:
        if abs(error := step_error(row, constants)) > 0.1 or row in parts["not used"]:
            print(f"  {row['round']} {row['submitter']} {row['system']} ({row['precision']}): {error:+.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
