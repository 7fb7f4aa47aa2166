#!/usr/bin/env python3
"""Is this config legal, does it fit, what will it do, when should it end? Needs no GPU and no torch.

    scripts/preflight.py config_DGXH100_1x8x4.sh              a config, sourced in a clean shell
    scripts/preflight.py                                      the current environment, as run.sub calls it
    scripts/preflight.py config_DGXH100_1x8x4.sh --plot x.png and a picture: LR, evaluations, memory
    scripts/preflight.py --inside                             and what only the node knows: files, hashes, GPUs

Exit status: 0 go, 1 no-go, 2 wrong usage. Memory is an account, times are a forecast: see memory.py and timing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llama2_lora.config import schedule
from llama2_lora.config.settings import Settings, SettingsError
from llama2_lora.forecast.plan import Finding, misspelt, plan

PIPE_WIDTH = 140  # columns where the output is no terminal
SOURCE_SECONDS = 5
SHELL_VARIABLES = ("PWD", "OLDPWD", "SHLVL", "_")
VERDICTS = {"no-go": "bold red", "warning": "yellow"}


class UsageError(ValueError):
    """The command line or the file it names is wrong."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="config_*.sh; default: the current environment")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw LR, evaluations and memory (.png, .svg, .pdf)")
    parser.add_argument("--inside", action="store_true", help="check files, hashes, checkpoint and GPUs of this node too")
    return parser.parse_args(argv)


def node_paths() -> dict[str, str]:
    """Where this node has data, checkpoint and results, which no config says."""
    names = ("DATA_PATH", "CKPT_PATH", "RESULTS_PATH")
    return {name: os.environ[name] for name in names if name in os.environ}  # noqa: TID251


def source(config: Path) -> dict[str, str]:
    """What `source CONFIG` exports in a shell that holds nothing else; the run's own paths are the caller's."""
    if not config.is_file():
        raise UsageError(f"{config}: no such file")
    if not fnmatch(config.name, "config_*.sh"):  # sourcing runs it, whatever it is
        raise UsageError(f"{config}: must be a config_*.sh")
    command = ["bash", "--noprofile", "--norc", "-c", 'source "$1" >&2 && env -0', "bash", str(config.resolve())]
    try:
        done = subprocess.run(
            command, env={"PATH": os.defpath}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SOURCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{config}: takes more than {SOURCE_SECONDS} s; a config exports variables and does nothing else"
        ) from None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or ["it prints nothing"]
        raise UsageError(f"{config}: bash cannot source it: {reason[-1]}")
    pairs = dict(item.split("=", 1) for item in done.stdout.split("\0") if "=" in item)
    exports = {name: value for name, value in pairs.items() if name not in (*SHELL_VARIABLES, "PATH")}
    return node_paths() | exports


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    """plan() of the config, with what its names, and with --inside this node, add. Illegal settings give findings only."""
    env = None if arguments.config is None else source(arguments.config)
    try:
        settings = Settings.from_env(env)
    except SettingsError as error:
        findings = [{"level": "no-go", "text": line} for line in str(error).splitlines()]
        return {"config": str(arguments.config or "environment"), "findings": findings, "go": False}
    values = plan(settings)
    extra = list(misspelt(env or {}))
    if arguments.inside:
        from llama2_lora.node.files import inspect

        values["inside"] = inspect(settings)
        extra += [Finding("no-go", f"{c['check']}: {c['text']}") for c in values["inside"] if c["passed"] is False]
    values["findings"] += [vars(finding) for finding in extra]
    values["go"] = not any(finding["level"] == "no-go" for finding in values["findings"])
    return values


# ---- For people ------------------------------------------------------------------------------------------------------


def show(values: dict[str, Any], console: Console) -> None:
    if "layout" in values:
        for title, rows in sections(values):
            table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
            table.add_column(no_wrap=True, min_width=26)
            table.add_column()
            for name, text in rows:
                table.add_row(escape(name), escape(text))
            console.print(table)
            console.print()
    for finding in values["findings"]:
        console.print(f"{finding['level']}: {finding['text']}", style=VERDICTS[finding["level"]], markup=False, soft_wrap=True)
    verdict = "go" if values["go"] else "no-go"
    console.print(f"{values['config']}: {verdict}", style="bold green" if values["go"] else "bold red", markup=False)


def sections(values: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = [(f"{values['config']}: ranks", layout_rows(values)), ("Schedule", schedule_rows(values))]
    if values["rules"]:
        rows = [(r["rule"], f"{'ok' if r['kept'] else 'NOT'}  {r['text']} ({r['paragraph']})") for r in values["rules"]]
        found.append(("Rules", rows))
    if values["platform"] == "cpu":
        found.append(("Memory and time", [("CPU rehearsal", "no GPU: neither is forecast, and no rule applies")]))
    if values["forecast"]:
        found.append((f"Time on {values['accelerator']}: a forecast", time_rows(values["forecast"])))
    if values["memory"]:
        found.append((f"Memory per GPU, {values['accelerator']}, GB", memory_rows(values["memory"])))
    if "inside" in values:
        state = {True: "ok ", False: "NOT", None: "?  "}
        found.append(("This node", [(c["check"], f"{state[c['passed']]} {c['text']}") for c in values["inside"]]))
    return found


def layout_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for row in values["layout"]:
        ranks, where = row["ranks"], "within a node" if row["within_a_node"] else "across nodes"
        listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        rows.append((row["group"], f"{row['size']}" + (f"  {where}; rank 0 with {listed}" if row["size"] > 1 else "")))
    b = values["batch"]
    accumulation = f"MBS {b['micro_batch_size']}, gradient accumulation {b['gradient_accumulation_steps']}"
    rows.append(("GBS", f"{b['global_batch_size']} = {b['data_parallel']} replicas x MINIBS {b['minibs']} ({accumulation})"))
    return rows


def schedule_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    evaluation, reference, gbs = values["evaluation"], values["convergence"], values["batch"]["global_batch_size"]
    steps = evaluation["steps"]
    listed = ", ".join(f"{step} ({step * gbs:,})" for step in steps[:4]) + (", ..." if len(steps) > 4 else "")
    rows = [("evaluations, step (sequences)", listed or "none"), ("then", f"every {evaluation['every_steps']} steps")]
    rows.append(("LR at step", "  ".join(f"{point['step']}: {point['lr']:.3g}" for point in values["learning_rate"]["points"])))
    if reference:
        mean, bound = reference["mean"], reference["bound"]
        rows.append(("reference converges after", f"{mean:,.0f} sequences = {mean / gbs:.0f} steps on average"))
        below = f"below {reference['reference']:,.0f} the score is scaled up"
        rows.append(("RCP", f"{below}; a mean of 10 runs below {bound:,.0f} fails the check"))
    return rows


def time_rows(times: dict[str, Any]) -> list[tuple[str, str]]:
    def interval(name: str, unit: str) -> str:
        value = times[name]
        return f"{value['middle']:.3g} {unit} ({value['low']:.3g} to {value['high']:.3g})"

    rows = [("step", interval("step_seconds", "s") + f", {times['samples_per_second']:.3g} samples/s")]
    rows.append(("evaluation", interval("eval_seconds", "s") + f", {times['evaluations']:.1f} a run"))
    rows.append(("run", interval("run_minutes", "min")))
    rows.append(("job", interval("job_minutes", "min") + f" of WALLTIME {times['walltime_minutes']:.0f} min"))
    if not times["like_published"]:
        rows.append(("", "no published run of this kind was there to fit: the interval is a guess"))
    return rows


def memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(item["name"], f"{item['gb']:7.2f}  [{item['source']}]") for item in memory["items"]]
    rows.append(("total", f"{memory['total_gb']:7.2f}  of {memory['capacity_gb']:.1f}: {memory['verdict']}"))
    return rows


def plot(values: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), width_ratios=(3, 2), layout="constrained")
    gbs, lr = values["batch"]["global_batch_size"], values["learning_rate"]
    steps = range(lr["max_steps"] + 1)
    curve = [schedule.learning_rate(step, lr["base"], lr["max_steps"], lr["warmup_steps"]) for step in steps]
    left.plot([step * gbs for step in steps], curve, label="learning rate")
    for i, sequences in enumerate(values["evaluation"]["sequences"]):
        left.axvline(sequences, color="0.85", linewidth=0.8, zorder=0, label="evaluation" if i == 0 else None)
    if reference := values["convergence"]:
        left.axvline(reference["mean"], color="tab:green", label="reference converges")
        left.axvline(reference["bound"], color="tab:red", linestyle="--", label="RCP bound")
    left.set(xlabel="sequences", ylabel="learning rate", title=values["config"], xlim=(0, None), ylim=(0, None))
    left.legend()
    if memory := values["memory"]:
        items = sorted(memory["items"], key=lambda item: item["gb"])
        right.barh([item["name"] for item in items], [item["gb"] for item in items])
        right.set(xlabel="GB per GPU", title=f"{memory['total_gb']:.0f} of {memory['capacity_gb']:.0f} GB")
    else:
        right.set_axis_off()
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        values = report(arguments)
        if arguments.plot and "layout" in values:
            try:
                plot(values, arguments.plot)
            except ValueError as error:  # matplotlib knows no such format
                raise UsageError(f"--plot {arguments.plot}: {error}") from None
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(values, indent=2))
    else:
        console = Console(soft_wrap=False)
        show(values, console if console.is_terminal else Console(width=PIPE_WIDTH))
    return 0 if values["go"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
