"""A summary on a terminal or in a pipe: tables, score and cost of each result, then the findings, then the verdict."""

from __future__ import annotations

import csv
import sys
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama2_lora.config import rules
from llama2_lora.findings import show
from llama2_lora.forecast.cost import Rates
from llama2_lora.judge.report import config_line, cost_line, grouped, score_line, table, verdict_line
from llama2_lora.judge.results import Result, Summary
from llama2_lora.judge.run import figures

PIPE_WIDTH = 150  # columns where the output is no terminal
NARROW = 130  # columns below which a terminal gets only these
NARROW_COLUMNS = ("run", "status", "minutes", "loss", "sequences", "seq/s", "rules")


def terminal(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def print_summary(summary: Summary, peak_tflops: float | None, rates: Rates) -> None:
    console = terminal(sys.stdout)
    if not summary.results:
        console.print(f"no log of {rules.NAME} in {escape(str(summary.folder))}")
    for result in summary.results:
        console.print(result_table(result, peak_tflops, console.width))
        for line in filter(None, (score_line(result), cost_line(result, rates))):
            console.print(escape(line))
    show(group.finding for group in grouped(summary))
    console.print(f"\n{verdict_line(summary)}", style="bold")


def result_table(result: Result, peak_tflops: float | None, width: int) -> Table:
    headings, rows = table(result, peak_tflops)
    shown = [i for i, name in enumerate(headings) if width >= NARROW or name in NARROW_COLUMNS]
    drawn = Table(title=f"{escape(result.name)}: {escape(config_line(result))}", title_justify="left")
    for name in (headings[i] for i in shown):
        left = name in ("run", "status", "rules")
        drawn.add_column(name, justify="left" if left else "right", no_wrap=name != "run", overflow="fold")
    for run, row in zip(result.runs, rows, strict=True):
        drawn.add_row(*(escape(row[i]) for i in shown), style="" if run.complied and run.converged else "red")
    return drawn


def print_csv(summary: Summary, peak_tflops: float | None) -> None:
    rows = [{"result": result.name, **figures(run, peak_tflops)} for result in summary.results for run in result.runs]
    if rows:
        writer = csv.DictWriter(sys.stdout, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
