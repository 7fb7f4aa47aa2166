"""Folders of logs -> results: which files are runs, and which runs belong together."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.findings import Finding, worst_first
from llama2_lora.judge.official import Score
from llama2_lora.judge.power import in_power_folder, is_power_log, power_of, read_power
from llama2_lora.judge.run import Run
from llama2_lora.judge.runlog import RunLog, read_log
from llama2_lora.judge.systems import find_system

# Runs that differ in one of these are not of one result (§2.2, §9.1)
HYPERPARAMETERS = (
    *("submission_division", "global_batch_size", "gradient_accumulation_steps"),
    *("opt_base_learning_rate", "opt_learning_rate_training_steps", "opt_learning_rate_warmup_factor"),
    *("opt_adamw_weight_decay", "opt_gradient_clip_norm", "lora_rank", "lora_alpha"),
    *("micro_batch_size", "tensor_parallelism", "pipeline_parallelism", "context_parallelism"),
)
NAMES = ("submission_platform", "submission_org", "submission_status", "config_filename")
CONFIG_KEYS = (*NAMES, *HYPERPARAMETERS)
NOT_A_LOG = re.compile(r"_checker|compliance|allreduce|requirements.*\.txt|readme", re.IGNORECASE)
DATESTAMP = re.compile(r"(\d{6}\w*)_\d+\.log")  # run.sub's <DATESTAMP>_<trial>.log
PLACEHOLDER = re.compile(r"placeholder|unknown|reference|unofficial|example|change.?me|\byour\b|\btodo\b|^\W*$", re.IGNORECASE)
MOST_NAMED = 5  # files in one finding


@dataclass
class Result:
    """Runs of one job or one folder with one set of hyperparameters."""

    name: str
    runs: list[Run] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    score: Score = field(default_factory=Score)

    @property
    def ok(self) -> bool:
        return all(run.complied and run.converged for run in self.runs) and not any(f.level == "error" for f in self.findings)

    @property
    def title(self) -> str:
        """The system's name: its description's, its folder's in a submission, the log's platform; else the job's folder."""
        folder = self.runs[0].path.parent
        in_tree = folder.parent.name if folder.name == rules.NAME else ""
        names = (*(run.system.name for run in self.runs), in_tree, str(self.config.get("submission_platform", "")))
        return next((name for name in names if name and not PLACEHOLDER.search(name)), self.name)

    @property
    def gbs(self) -> int | None:
        return next((run.gbs for run in self.runs if run.gbs), None)

    @property
    def precision(self) -> str | None:
        """That of most runs."""
        return Counter(run.precision for run in self.runs).most_common(1)[0][0] if self.runs else None

    def fits(self, run: Run) -> bool:
        """True where the run's hyperparameters and machine are this one's. A value that a damaged log lacks fits any."""
        same = all(run.values.get(key, value) == value for key, value in self.config.items() if key in HYPERPARAMETERS)
        machine = {r.system.accelerators for r in (*self.runs, run) if r.system.accelerators}
        return same and len(machine) < 2

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.config = {key: run.values[key] for key in CONFIG_KEYS if key in run.values} | self.config

    def names(self, key: str) -> dict[str, list[Run]]:
        """Each value that the runs give a name key, with its runs."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            if key in run.values:
                found.setdefault(str(run.values[key]), []).append(run)
        return found


@dataclass
class Summary:
    """All that was found under one folder."""

    folder: Path
    ruleset: str
    results: list[Result]
    findings: list[Finding] = field(default_factory=list)  # about files, not runs

    @property
    def runs(self) -> list[Run]:
        return [run for result in self.results for run in result.runs]

    @property
    def ok(self) -> bool:
        """There is a run, and all complied and converged."""
        return bool(self.results) and all(result.ok for result in self.results)

    def all_findings(self) -> list[Finding]:
        """Errors first."""
        runs = [f for result in self.results for f in (*result.findings, *(f for r in result.runs for f in r.findings))]
        return worst_first([*self.findings, *runs])


def total(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


# ---- Finding the logs ------------------------------------------------------------------------------------------------


def log_files(folder: Path) -> list[Path]:
    """Files that can be run logs: run.sub's *.log, a submission's result_*.txt, anything else in *.txt.

    Checkers' own reports quote log lines, so they are left out by name; so is the code beside a submission's results/.
    """
    if folder.is_file():
        return [folder]
    found = []
    for place, folders, names in os.walk(folder):
        if "results" in folders and "benchmarks" in folders:
            folders.remove("benchmarks")
        found += [Path(place, name) for name in names if name.endswith((".log", ".txt")) and not NOT_A_LOG.search(name)]
    return sorted((f for f in found if f.is_file()), key=_natural)


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def read_runs(folder: Path) -> tuple[list[Run], list[Finding]]:
    """Every run under a folder, with its power, and what was passed over."""
    files = log_files(folder)
    in_power = [f for f in files if in_power_folder(f, folder)]
    power = read_power(in_power)
    runs, found, empty = [], [], []
    for path in files if not in_power else [f for f in files if f not in set(in_power)]:
        try:
            log = read_log(path)
        except OSError as error:
            found.append(Finding("warning", "unreadable", str(error.strerror), str(path)))
            continue
        if not log.mllog_lines:
            empty.append(path)
        elif is_power_log(log):
            found.append(_lone_power_log(log))
        else:
            run = Run(log)
            name = run.values.get("submission_benchmark", rules.NAME)
            if name != rules.NAME:
                found.append(Finding("note", "other benchmark", f"left out: a log of {name}", str(path)))
                continue
            run.system, run.power = find_system(run), power.pop(str(path.with_suffix("")), None)
            runs.append(run)
    found += [Finding("note", "power log", "power was measured of a run that is not here", name) for name in power]
    return runs, [*found, *_no_logs(empty)]


def _lone_power_log(log: RunLog) -> Finding:
    power = power_of([log])
    mean = f"{power.mean_watts / 1e3:.2f} kW on average" if power else "without a reading"
    rule = "power/<run>/node_<n>.txt beside the run is counted to it"
    return Finding("note", "power log", f"readings of a power meter, no run: {mean}; {rule}", str(log.path))


def _no_logs(paths: list[Path]) -> Iterator[Finding]:
    if paths:
        names = ", ".join(map(str, paths[:MOST_NAMED])) + (", ..." if len(paths) > MOST_NAMED else "")
        count = f"{len(paths)} file{'s' * (len(paths) != 1)}"
        yield Finding("note", "no log", f"{count} without a :::MLLOG line, left out: {names}")


# ---- Which runs belong together --------------------------------------------------------------------------------------


def group(runs: Iterable[Run], root: Path) -> list[Result]:
    """Runs by job and hyperparameters. A job is a folder, or the files of one DATESTAMP in it."""
    jobs: dict[tuple[Path, str], list[Result]] = {}
    for run in runs:
        stamped = DATESTAMP.fullmatch(run.path.name)
        results = jobs.setdefault((run.path.parent, stamped[1] if stamped else ""), [])
        result = next((r for r in results if r.fits(run)), None)
        if result is None:
            result = Result("")
            results.append(result)
        result.add(run)
    for (folder, stamp), results in jobs.items():
        several = bool(stamp) and sum(place == folder for place, _ in jobs) > 1
        for result in results:
            result.name = _place(folder, root) + (f"/{stamp}" if several else "")
    return _joined([result for results in jobs.values() for result in results], root)


def _place(folder: Path, root: Path) -> str:
    relative = folder.relative_to(root) if root.is_dir() else Path()
    return root.resolve().name if relative == Path() else str(relative)


def _joined(results: list[Result], root: Path) -> list[Result]:
    """Jobs that are a whole result only together: ten runs in sub-folders, or of a job that was submitted again."""
    needed = rules.RUNS_PER_RESULT
    parts = [r for r in results if len(r.runs) < needed and not _in_submission(r)]
    for first in parts:
        if not first.runs:
            continue  # joined to an earlier one
        same = [r for r in parts if r.runs and all(r.fits(run) for run in first.runs)]
        beside = [r for r in same if r.runs[0].path.parent.parent == first.runs[0].path.parent.parent]
        for together in (same, beside):
            if len(together) > 1 and first in together and sum(len(r.runs) for r in together) == needed:
                _join(together, root)
                break
    return [r for r in results if r.runs]


def _in_submission(result: Result) -> bool:
    """results/<system>/llama2_70b_lora: the tree says what belongs together."""
    return result.runs[0].path.parent.name == rules.NAME


def _join(parts: list[Result], root: Path) -> None:
    first, rest = parts[0], parts[1:]
    text = f"{rules.RUNS_PER_RESULT} runs of {len(parts)} jobs or folders with the same hyperparameters, taken as one result"
    for other in rest:
        for run in other.runs:
            first.add(run)
        other.runs = []
    folder = Path(os.path.commonpath([run.path.parent for run in first.runs]))
    first.name = _place(folder, root)
    first.findings.append(Finding("note", "joined", text, str(folder)))


def repeats(results: list[Result]) -> Iterator[tuple[Result, Finding]]:
    """Logs that are another result's: the same losses after the same minutes."""
    seen: dict[Any, tuple[Result, Run]] = {}
    for result in results:
        others: Counter[int] = Counter()
        first: dict[int, tuple[Result, Run, Run]] = {}
        for run in result.runs:
            if len(run.evaluations) < 2 or run.train_minutes is None or run.rehearsal:
                continue
            other, twin = seen.setdefault((tuple(run.evaluations), round(run.train_minutes, 6)), (result, run))
            if other is not result:
                others[id(other)] += 1
                first.setdefault(id(other), (other, twin, run))
        for key, count in others.items():
            other, twin, run = first[key]
            text = f"{count} of {len(result.runs)} runs repeat those of {other.name}: the same losses and minutes"
            yield result, Finding("warning", "repeated logs", f"{text}, such as {twin.path}", str(run.path))
