#!/usr/bin/env python3
"""Ten logs -> the folder that one submits: systems/, benchmarks/ with this code, results/, passed by the official checkers.

    scripts/package_submission.py LOGDIR --system my_system.json --output submission

Where my_system.json does not exist it is written, with what the logs know; fill in the rest. A second system of the same
submitter joins the tree of the first. Whatever is missing or against the rules is listed at once, and then nothing is made or
changed. Exit status: 0 made, 1 refused, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from llama2_lora.config import rules
    from llama2_lora.judge.checks import judge
    from llama2_lora.judge.submission import Code, code_problems, configs, folder_name, read_system, run_problems
    from llama2_lora.judge.tree import Entry, build, tree_problems

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="LOGDIR")
    help_system = "system description, JSON, named after the system"
    parser.add_argument("--system", type=Path, required=True, metavar="FILE", help=help_system)
    help_output = "DIR/<submitter> is made, or gets the system where it is a submission"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=help_output)
    parser.add_argument("--ruleset", choices=rules.RULESETS, default="5.1.0", help="rules to check by (5.1.0)")
    parser.add_argument("--config", metavar="FILE", help="the runs' config, where their logs name none")
    parser.add_argument("--accept-unconverged", action="store_true", help="take one run that failed to converge (§12)")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder}: is not a folder")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    summary, code = judge(arguments.folder, arguments.ruleset), Code.of(ROOT)
    system, system_problems = read_system(arguments.system, summary)
    problems = [*run_problems(summary, arguments.accept_unconverged), *system_problems]
    problems += code_problems(summary, code, arguments.config)
    submitter = str(system.get("submitter") or "submitter")
    target = arguments.output / folder_name(submitter)
    for what, text in (("submitter", submitter), ("--system", arguments.system.stem)):
        if not folder_name(text):
            problems.append(f"{what} {text!r}: gives no folder name; it needs a letter or a digit")
    config = next(iter(configs(summary, arguments.config)), "")
    entry = Entry(folder_name(arguments.system.stem), system, summary, config, code)
    problems = problems or [*tree_problems(target, entry)] or build(target, entry, arguments.ruleset)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        print(f"refused: {count}, nothing was made", file=sys.stderr)
        return 1
    print(f"made {target}: the package, system description and repository checkers pass ({arguments.ruleset})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
