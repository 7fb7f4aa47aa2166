#!/usr/bin/env python3
"""Judge a folder of run logs: did the runs comply, converge, how fast, what do they score, how do they compare?

    scripts/summarize.py LOGDIR                    table, score and every warning
    scripts/summarize.py LOGDIR --html page.html   one self-contained page beside the table
    scripts/summarize.py LOGDIR --watch            follow a running job

LOGDIR is what run.sub writes, a submission's results/ tree, or one log. Exit status: 0 all runs complied and converged,
1 not all (or no run), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llama2_lora import benchmark
from llama2_lora.checks import judge
from llama2_lora.results import Result, Summary, figures

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
PIPE_WIDTH = 150  # columns where the output is no terminal
WORST_MESSAGES = 3  # of the official checker, per run


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="LOGDIR")
    parser.add_argument("--ruleset", choices=benchmark.RULESETS, default="5.1.0", help="rules to judge by (5.1.0)")
    parser.add_argument("--peak-tflops", type=_positive, metavar="X", help="dense peak of one accelerator, for MFU")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print one CSV row per run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs nothing else")
    arguments = parser.parse_args(argv)
    if not arguments.folder.exists():
        parser.error(f"{arguments.folder}: does not exist")
    return arguments


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    summary = judge(arguments.folder, arguments.ruleset)
    if arguments.json:
        print(json.dumps(summary.as_dict(arguments.peak_tflops), indent=2))
    elif arguments.csv:
        print_csv(summary, arguments.peak_tflops)
    else:
        print_summary(summary, arguments.peak_tflops)
    return 0 if summary.ok else 1


def print_csv(summary: Summary, peak_tflops: float | None) -> None:
    rows = [{"result": result.name, **figures(run, peak_tflops)} for result in summary.results for run in result.runs]
    if rows:
        writer = csv.DictWriter(sys.stdout, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def print_summary(summary: Summary, peak_tflops: float | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    if not summary.results:
        console.print(f"no log of {benchmark.NAME} in {escape(str(summary.folder))}")
    for result in summary.results:
        console.print(result_table(result, peak_tflops))
        console.print(escape(score_line(result)))
    print_findings(console, summary)
    verdict = "all runs complied and converged" if summary.ok else "not all runs complied and converged"
    console.print(f"\n{len(summary.runs)} runs, rules {summary.ruleset}: {verdict}", style="bold")


def result_table(result: Result, peak_tflops: float | None) -> Table:
    table = Table(title=f"{escape(result.name)}: {escape(config_line(result))}", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in ("minutes", "evals", "loss", "sequences", "seq/s", "s/step", "MFU", "eval", "init min", "seed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rules", no_wrap=True)
    table.add_column("vs published", justify="right", no_wrap=True)
    for run in result.runs:
        table.add_row(*cells(figures(run, peak_tflops)), style="" if run.converged else "red")
    return table


def config_line(result: Result) -> str:
    config = result.config
    names = {
        "submission_platform": "",
        "global_batch_size": "GBS ",
        "gradient_accumulation_steps": "accumulation ",
        "opt_base_learning_rate": "LR ",
        "opt_learning_rate_training_steps": "steps ",
    }
    return ", ".join(f"{label}{config[key]}" for key, label in names.items() if key in config)


def cells(row: dict[str, Any]) -> list[str]:
    """A run's figures as text; a dash where the log does not tell."""
    formats = {
        "run": "{}",
        "status": "{}",
        "train_minutes": "{:.2f}",
        "evaluations": "{}",
        "final_loss": "{:.4f}",
        "sequences_to_converge": "{:,}",
        "samples_per_second": "{:.2f}",
        "step_seconds": "{:.3f}",
        "mfu": "{:.1%}",
        "eval_share": "{:.1%}",
        "init_minutes": "{:.1f}",
        "seed": "{}",
    }
    texts = ["-" if row[key] is None else form.format(row[key]) for key, form in formats.items()]
    verdict = "complied" if row["complied"] else "BROKEN"
    difference = row["loss_minus_published_median"]
    return [escape(t) for t in texts] + [verdict, "-" if difference is None else f"{difference:+.4f}"]


def score_line(result: Result) -> str:
    score = result.score
    if score.minutes is None:
        return score.reason + (f" (RCP: {score.rcp})" if score.rcp else "")
    passed = {True: "passed", False: "FAILED", None: ""}[score.rcp_passed]
    parts = f"olympic mean {score.olympic_minutes:.3f} min x scaling {score.scaling:.4f}"
    return f"score: {score.minutes:.3f} minutes ({parts}; RCP {passed}: {score.rcp})"


def print_findings(console: Console, summary: Summary) -> None:
    for run in summary.runs:
        for message in run.compliance[:WORST_MESSAGES]:
            print_line(console, "error", str(run.path), f"compliance checker: {message.splitlines()[0]}")
        if (more := len(run.compliance) - WORST_MESSAGES) > 0:
            print_line(console, "error", str(run.path), f"compliance checker: {more} more (--json has them all)")
    for finding in summary.all_findings():
        print_line(console, finding.level, finding.where, finding.text)


def print_line(console: Console, level: str, where: str, text: str) -> None:
    console.print(f"[{STYLES[level]}]{level}[/] {escape(where)}: {escape(text)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
