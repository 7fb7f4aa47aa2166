#!/usr/bin/env python3
"""Make src/llama2_lora/judge/data/envelope.csv: how published runs converged, by global batch size and precision.

    python benchmarks/envelope.py

eval_curves.csv holds the evaluation losses of the runs in mlcommons/training_results_v4.1, _v5.0 and _v5.1 on NVIDIA GPUs, per
group of one LR and one number of steps, and (lr empty) of all together: how many still ran at each evaluation, and the
quantiles of their losses.

Groups that evaluated at other points than the rules' (§9.4) are left out; where a GBS has no other (18), they stay and are
labelled. Where a group was left out (16, 64), the quantiles are those of the mixture of the others, each taken as piecewise
linear between its five quantiles. At GBS 8, where the runs' own are known, the median of such a mixture is within 0.0002 of
theirs; its 95% quantile is up to 0.008 above, where single runs are far off.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2_lora.config import schedule

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "src/llama2_lora/judge/data/envelope.csv"
LEAST_RUNS = 5  # still running; fewer say nothing
QUANTILES = ("min", "p05", "median", "p95", "max")
SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)
# Rounds with entries of that GBS and precision (published_results.csv; 72: neither v4.1 nor v5.0 has one)
ROUNDS = {
    (8, "fp8"): "v4.1 v5.0 v5.1",
    (8, "fp4"): "v5.1",
    (9, "fp8"): "v5.0 v5.1",
    (16, "fp8"): "v4.1 v5.0 v5.1",
    (18, "fp8"): "v5.0",
    (64, "fp8"): "v4.1 v5.0 v5.1",
    (72, "fp8"): "v5.1",
    (128, "fp8"): "v4.1",
}
COLUMNS = ["gbs", "precision", "rounds", "schedule", "sequences", "runs", "running", "p05", "median", "p95", "share_converged"]
HEADER = """\
# Evaluation loss (nats) of published MLPerf Training llama2_70b_lora runs on NVIDIA GPUs. Made by benchmarks/envelope.py of
# the runs' own logs (mlcommons/training_results_v4.1, _v5.0, _v5.1): figures only.
# fp4: NVFP4 and then FP8 ("healed"). schedule: the rules', or other where only runs with another one were published.
# runs: in all; running: of them, those that had not stopped before; quantiles over those. A median over runs of which many
# have stopped is one of the slow ones: compare only where running is at least 95% of runs.
"""


def main() -> int:
    TARGET.write_text(text())
    print(f"made {TARGET}")
    return 0


def text() -> str:
    """The whole file."""
    groups: dict[tuple[int, str], dict[tuple[str, str], list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with (HERE / "eval_curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            groups[int(row["gbs"]), row["precision"]][row["lr"], row["max_steps"]].append(row)
    out = io.StringIO(HEADER)
    out.seek(0, io.SEEK_END)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (gbs, precision), found in sorted(groups.items()):
        for row in envelope(gbs, list(found.values())):
            writer.writerow([gbs, precision, ROUNDS[gbs, precision], *row])
    return out.getvalue()


def envelope(gbs: int, groups: list[list[dict[str, str]]]) -> Iterator[list[Any]]:
    whole, groups = [g for g in groups if not g[0]["lr"]], [g for g in groups if g[0]["lr"]]
    lawful = [kept for group in groups if (kept := by_the_rules(gbs, group))]
    schedule_name = "rules" if lawful else "other"
    groups = whole if lawful == groups or not lawful else lawful
    runs = sum(max(int(row["n_at_count"]) for row in group) for group in groups)
    converged = 0
    for sequences in sorted({int(row["samples_count"]) for group in groups for row in group}):
        rows = [row for group in groups for row in group if int(row["samples_count"]) == sequences]
        running = sum(int(row["n_at_count"]) for row in rows)
        converged += sum(int(row["n_converged_here"]) for row in rows)
        if running >= LEAST_RUNS:
            quantiles = [f"{quantile(rows, share):.5f}" for share in (0.05, 0.5, 0.95)]
            yield [schedule_name, sequences, runs, running, *quantiles, f"{converged / runs:.4f}"]


def by_the_rules(gbs: int, group: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of a group's lawful runs; nothing where lawful and other runs of it cannot be told apart."""
    first, every = schedule.first_eval_step(gbs) * gbs, schedule.eval_every_steps(gbs) * gbs
    counts = [int(row["samples_count"]) for row in group]
    lawful = [c >= first and (c - first) % every == 0 for c in counts]
    if all(lawful):
        return group
    kept = [row for row, ok in zip(group, lawful, strict=True) if ok]
    start = next((int(row["n_at_count"]) for row in kept if int(row["samples_count"]) == first), 0)
    other = max(int(row["n_at_count"]) for row, ok in zip(group, lawful, strict=True) if not ok)
    apart = start + other == int(group[0]["n_runs_in_group"])  # two sets of runs that share no evaluation
    return kept if apart else []


def quantile(rows: list[dict[str, str]], share: float) -> float:
    """Of a mixture of groups: the loss below which `share` of their runs lie."""
    if len(rows) == 1:
        return float(rows[0][{0.05: "p05", 0.5: "median", 0.95: "p95"}[share]])
    low, high = (pick(float(row[name]) for row in rows) for pick, name in ((min, "min"), (max, "max")))
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(int(row["n_at_count"]) * share_below(row, middle) for row in rows)
        low, high = (middle, high) if below < share * sum(int(row["n_at_count"]) for row in rows) else (low, middle)
    return (low + high) / 2


def share_below(row: dict[str, str], loss: float) -> float:
    values = [float(row[name]) for name in QUANTILES]
    if loss >= values[-1]:
        return 1.0
    for low, high, a, b in zip(values, values[1:], SHARES, SHARES[1:], strict=False):
        if low <= loss < high:
            return a + (b - a) * (loss - low) / (high - low)
    return 0.0


if __name__ == "__main__":
    raise SystemExit(main())
