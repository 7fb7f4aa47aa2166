#!/usr/bin/env python3
"""Judge a folder of run logs: did the runs comply, converge, how fast, what do they score and cost, how do they compare?

    scripts/summarize.py LOGDIR                    table, score, cost and every warning
    scripts/summarize.py LOGDIR --html page.html   one self-contained page beside the table
    scripts/summarize.py LOGDIR --watch            follow a running job

LOGDIR is what run.sub writes, a submission's results/ tree, or one log. Exit status: 0 all runs complied and converged,
1 not all (or no run), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from llama2_lora.findings import Finding
    from llama2_lora.forecast.cost import Rates, positive
    from llama2_lora.judge.checks import RULESETS, judge
    from llama2_lora.judge.page import page
    from llama2_lora.judge.report import as_dict
    from llama2_lora.judge.results import Summary
    from llama2_lora.judge.terminal import print_csv, print_summary
    from llama2_lora.judge.watch import watch


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="LOGDIR")
    parser.add_argument("--ruleset", choices=RULESETS, default="5.1.0", help="rules to judge by (5.1.0)")
    parser.add_argument("--peak-tflops", type=positive, metavar="X", help="dense peak of one accelerator, for MFU")
    parser.add_argument("--gpu-hour-price", type=positive, metavar="P", help="price of one GPU for an hour, for the cost")
    help_watts = "mean power of one GPU with its share of the node, where no meter's log is there"
    parser.add_argument("--gpu-watts", type=positive, metavar="W", help=help_watts)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print one CSV row per run")
    help_watch = "follow a job: look again every S seconds (5) until its trials have ended or it was killed"
    parser.add_argument("--watch", type=positive, nargs="?", const=5.0, metavar="S", help=help_watch)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs nothing else")
    arguments = parser.parse_args(argv)
    if not arguments.folder.exists():
        parser.error(f"{arguments.folder}: does not exist")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a log may hold what a terminal cannot show
    rates, peak = Rates(arguments.gpu_hour_price, arguments.gpu_watts), arguments.peak_tflops

    def look() -> Summary:
        return judge(arguments.folder, arguments.ruleset)

    summary = watch(look, arguments.watch, peak, sys.stderr) if arguments.watch else look()
    unknown = any(not (run.rehearsal or run.system.accelerators) for run in summary.runs)
    if unknown and (peak or rates != Rates()):
        where = "run.sub's .env, SYSJSON, systems/<name>.json and config_filename name none"
        summary.findings.append(Finding("note", "no MFU", f"number of accelerators unknown, so no MFU and no cost: {where}"))
    if arguments.json:
        print(json.dumps(as_dict(summary, peak, rates), indent=2))
    elif arguments.csv:
        print_csv(summary, peak)
    else:
        print_summary(summary, peak, rates)
    if arguments.html:
        try:
            arguments.html.write_text(page(summary, peak, rates), encoding="utf-8", errors="replace")
        except OSError as error:
            print(f"error: --html {arguments.html}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if summary.ok else 1


if __name__ == "__main__":
    sys.exit(main())
