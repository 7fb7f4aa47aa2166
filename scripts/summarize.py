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
import contextlib
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llama2_lora.config import rules
from llama2_lora.judge.checks import judge
from llama2_lora.judge.report import (
    COLUMNS,
    cells,
    compliance_findings,
    config_line,
    page,
    progress_line,
    score_line,
    verdict_line,
)
from llama2_lora.judge.results import Result, Summary, job_environment
from llama2_lora.judge.run import Finding, figures

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
PIPE_WIDTH = 150  # columns where the output is no terminal
NARROW = 130  # columns below which a terminal gets only these
NARROW_COLUMNS = ("run", "status", "minutes", "loss", "sequences", "seq/s", "rules")
MOST_MESSAGES = 3  # of the official checker, per run


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="LOGDIR")
    parser.add_argument("--ruleset", choices=rules.RULESETS, default="5.1.0", help="rules to judge by (5.1.0)")
    parser.add_argument("--peak-tflops", type=_positive, metavar="X", help="dense peak of one accelerator, for MFU")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print one CSV row per run")
    help_watch = "follow a job: look again every S seconds (5) until its trials have ended"
    parser.add_argument("--watch", type=_positive, nargs="?", const=5.0, metavar="S", help=help_watch)
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
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a log may hold what a terminal cannot show
    summary = watch(arguments) if arguments.watch else judge(arguments.folder, arguments.ruleset)
    if arguments.peak_tflops and any(not (run.rehearsal or run.system.accelerators) for run in summary.runs):
        where = "run.sub's .env, SYSJSON, systems/<name>.json and config_filename name none"
        summary.findings.append(Finding("note", "no MFU", f"number of accelerators unknown: {where}"))
    if arguments.json:
        print(json.dumps(summary.as_dict(arguments.peak_tflops), indent=2))
    elif arguments.csv:
        print_csv(summary, arguments.peak_tflops)
    else:
        print_summary(summary, arguments.peak_tflops)
    if arguments.html:
        try:
            arguments.html.write_text(page(summary, arguments.peak_tflops), encoding="utf-8", errors="replace")
        except OSError as error:
            print(f"error: --html {arguments.html}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if summary.ok else 1


def watch(arguments: argparse.Namespace) -> Summary:
    """Show the runs as they grow, until as many as the job was to make have ended, or Ctrl-C."""
    summary = judge(arguments.folder, arguments.ruleset)
    console = terminal(sys.stderr)
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            tables = [result_table(result, arguments.peak_tflops, console.width) for result in summary.results]
            newest = max(summary.runs, key=lambda run: run.path.stat().st_mtime, default=None)
            under_way = newest is None or newest.status in ("never started", "unfinished")
            live.update(Group(*tables, escape(progress_line(newest)) if newest else "no run yet"), refresh=True)
            if not under_way and len(summary.runs) >= trials(summary):
                return summary
            time.sleep(arguments.watch)
            summary = judge(arguments.folder, arguments.ruleset)
    return summary


def trials(summary: Summary) -> int:
    """Runs that the job is to make: NEXP in what run.sub noted, else one."""
    noted = (job_environment(run.path).get("NEXP", "1") for run in summary.runs)
    return max((int(text) for text in noted if text.isdigit()), default=1)


def print_csv(summary: Summary, peak_tflops: float | None) -> None:
    rows = [{"result": result.name, **figures(run, peak_tflops)} for result in summary.results for run in result.runs]
    if rows:
        writer = csv.DictWriter(sys.stdout, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def print_summary(summary: Summary, peak_tflops: float | None) -> None:
    console = terminal(sys.stdout)
    if not summary.results:
        console.print(f"no log of {rules.NAME} in {escape(str(summary.folder))}")
    for result in summary.results:
        console.print(result_table(result, peak_tflops, console.width))
        console.print(escape(score_line(result)))
    for finding in compliance_findings(summary, MOST_MESSAGES) + summary.all_findings():
        print_line(console, finding)
    console.print(f"\n{verdict_line(summary)}", style="bold")


def result_table(result: Result, peak_tflops: float | None, width: int) -> Table:
    names = [name for name in COLUMNS if width >= NARROW or name in NARROW_COLUMNS]
    table = Table(title=f"{escape(result.name)}: {escape(config_line(result))}", title_justify="left")
    for name in names:
        left = name in ("run", "status", "rules")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run", overflow="fold")
    for run in result.runs:
        row = dict(zip(COLUMNS, cells(figures(run, peak_tflops)), strict=True))
        table.add_row(*(escape(row[name]) for name in names), style="" if run.complied and run.converged else "red")
    return table


def terminal(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def print_line(console: Console, finding: Finding) -> None:
    style = STYLES[finding.level]
    where = f"{finding.where}: " if finding.where else ""
    console.print(f"[{style}]{finding.level}[/] {escape(where + finding.text)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
