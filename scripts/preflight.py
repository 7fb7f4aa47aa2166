#!/usr/bin/env python3
"""Is this config legal, does it fit, what will it do, when should it end? Needs no GPU and no torch.

    scripts/preflight.py config_DGXH100_1x8x4.sh              a config, sourced in a clean shell
    scripts/preflight.py                                      the current environment, as run.sub calls it
    scripts/preflight.py config_DGXH100_1x8x4.sh --plot x.png and a picture: LR, evaluations, memory
    scripts/preflight.py --inside                             and what only the node knows: files, hashes, GPUs
    scripts/preflight.py CONFIG --measured FILE               times and memory from a rank that scripts/measure.py measured

Exit status: 0 go, 1 no-go, 2 wrong usage. Memory is an account, times are a forecast: see memory.py and timing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from llama2_lora.config.names import unknown
    from llama2_lora.config.settings import Settings, SettingsError
    from llama2_lora.config.shell import source
    from llama2_lora.findings import Finding, at_least, count, exit_status, show
    from llama2_lora.forecast.cost import Rates, cost, positive
    from llama2_lora.forecast.measured import Measured
    from llama2_lora.forecast.measured import read as read_measured
    from llama2_lora.forecast.plan import Plan, plan
    from llama2_lora.forecast.show import plot, show_plan

# What no config says: where a node has its files, and who submits which system
OF_THE_SITE = ("DATA_PATH", "CKPT_PATH", "RESULTS_PATH", "MLPERF_SUBMITTER", "MLPERF_SYSTEM_NAME", "MLPERF_STATUS")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="config_*.sh; default: the current environment")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw LR, evaluations and memory (.png, .svg, .pdf)")
    parser.add_argument("--inside", action="store_true", help="check files, hashes, checkpoint and GPUs of this node too")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="what scripts/measure.py wrote of this config")
    parser.add_argument("--gpu-hour-price", type=positive, metavar="P", help="price of one GPU for an hour, for the cost")
    help_watts = "mean power of one GPU with its share of the node, for the energy"
    parser.add_argument("--gpu-watts", type=positive, metavar="W", help=help_watts)
    return parser.parse_args(argv)


def environment(config: Path | None) -> dict[str, str]:
    """What settings are read from: a config's exports with what the site says, or the current environment."""
    here = dict(os.environ)  # noqa: TID251
    if config is None:
        return here
    return source(config, {name: here[name] for name in OF_THE_SITE if name in here})


def examine(
    config: Path | None, inside: bool, rank: Measured | None
) -> tuple[Plan | None, list[Finding], list[Finding] | None]:
    """The plan, unless the settings are illegal; everything to be said; and what this node's own checks found."""
    env = environment(config)
    names = list(unknown(env, ours=config is not None))
    try:
        settings = Settings.from_env(env)
    except SettingsError as error:
        return None, [*(Finding("error", "settings", problem) for problem in error.problems), *names], None
    found = plan(settings, rank)
    here = None
    if inside:
        from llama2_lora.node.files import inspect

        here = inspect(settings)
    return found, [*found.findings, *names, *at_least(here or [], "warning")], here


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        rank = read_measured(arguments.measured) if arguments.measured else None
        found, findings, inside = examine(arguments.config, arguments.inside, rank)
        if arguments.plot and found:
            with missing_package_named():
                plot(found, arguments.plot)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status, rates = exit_status(findings), Rates(arguments.gpu_hour_price, arguments.gpu_watts)
    if arguments.json:
        values: dict[str, Any] = found.as_dict() if found else {"config": str(arguments.config or "environment")}
        values |= {"findings": [vars(finding) for finding in findings], "go": status == 0}
        if found and found.forecast:
            values["cost"] = {
                name: vars(cost(hours.middle, rates))
                for name, hours in zip(("run", "job"), found.forecast.gpu_hours(), strict=True)
            }
        values |= {} if inside is None else {"inside": [vars(check) for check in inside]}
        print(json.dumps(values, indent=2))
        return status
    if found:
        show_plan(found, inside, rates)
    show(findings)
    problems = count(findings)
    verdict = "no-go" if status else "go"
    print(f"{found.config if found else arguments.config or 'environment'}: {verdict}{problems and f', {problems}'}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
