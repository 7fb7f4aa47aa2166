"""Folders of logs -> results: the runs of one folder with one config, and their score."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.forecast import convergence
from llama2_lora.gpus import ACCELERATORS
from llama2_lora.judge.run import Finding, Run, System, figures
from llama2_lora.judge.runlog import cached_rules, quiet_mlperf, read_log

CONFIG_KEYS = (
    *("submission_platform", "submission_org", "submission_division", "global_batch_size", "gradient_accumulation_steps"),
    *("opt_base_learning_rate", "opt_learning_rate_training_steps", "opt_learning_rate_warmup_factor"),
    *("opt_adamw_weight_decay", "opt_gradient_clip_norm", "lora_rank", "lora_alpha", "config_filename"),
    *("micro_batch_size", "tensor_parallelism", "pipeline_parallelism", "context_parallelism"),
)


@dataclass
class Score:
    """What the runs of a result are worth. `minutes` is None where there is no score; `reason` says why."""

    minutes: float | None = None
    olympic_minutes: float | None = None
    scaling: float | None = None
    rcp: str = ""  # the RCP checker's message
    rcp_passed: bool | None = None
    sequences: float | None = None  # olympic mean to converge
    reference_sequences: float | None = None  # below this a result is scaled up to it
    bound_sequences: float | None = None  # below this it fails
    reason: str = ""


@dataclass
class Result:
    """Runs of one folder with one config."""

    name: str
    runs: list[Run] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    score: Score = field(default_factory=Score)

    @property
    def ok(self) -> bool:
        return all(run.complied and run.converged for run in self.runs) and not any(f.level == "error" for f in self.findings)

    def fits(self, run: Run) -> bool:
        """True where the run's config is this one's. A value that a damaged log lacks fits any."""
        return all(run.values.get(key, value) == value for key, value in self.config.items())

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.config = {key: run.values[key] for key in CONFIG_KEYS if key in run.values} | self.config


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
        return sorted([*self.findings, *runs], key=lambda f: ("error", "warning", "note").index(f.level))

    def as_dict(self, peak_tflops: float | None = None) -> dict[str, Any]:
        whole = {
            "folder": str(self.folder),
            "ruleset": self.ruleset,
            "ok": self.ok,
            "results": [_result_dict(result, peak_tflops) for result in self.results],
            "findings": [vars(f) for f in self.all_findings()],
        }
        return _strict(whole)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; a log's values may."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _result_dict(result: Result, peak_tflops: float | None) -> dict[str, Any]:
    runs = [
        {
            **figures(run, peak_tflops),
            "losses": run.evaluations,
            "compliance_messages": run.compliance,
            "file": str(run.path),
        }
        for run in result.runs
    ]
    return {
        "name": result.name,
        "ok": result.ok,
        "config": result.config,
        "score": vars(result.score),
        "runs": runs,
    }


# ---- Finding the logs ------------------------------------------------------------------------------------------------


def log_files(folder: Path) -> list[Path]:
    """Files that can be run logs: run.sub's *.log, a submission's result_*.txt, anything else in *.txt.

    Checkers' own reports quote log lines, so they are left out by name.
    """
    if folder.is_file():
        return [folder]
    files = (f for f in folder.rglob("*") if f.suffix in (".log", ".txt") and f.is_file())
    return sorted((f for f in files if not re.search(r"_checker|compliance|allreduce", f.name)), key=_natural)


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def read_runs(folder: Path) -> tuple[list[Run], list[Finding]]:
    """Every log in a folder that has events of this benchmark, and what was passed over."""
    runs, skipped = [], []
    for path in log_files(folder):
        try:
            run = Run(read_log(path))
        except OSError as error:
            skipped.append(Finding("warning", "unreadable", str(error.strerror), str(path)))
            continue
        name = run.values.get("submission_benchmark", rules.NAME)
        if not run.log.events and not run.log.damaged:
            continue
        if name != rules.NAME:
            skipped.append(Finding("note", "other benchmark", f"left out: a log of {name}", str(path)))
            continue
        run.system = find_system(run)
        runs.append(run)
    return runs, skipped


def find_system(run: Run) -> System:
    """Accelerators of a run: run.sub's .env beside the log, else SYSJSON, systems/NAME.json or the config's name."""
    values, described = job_environment(run.path), run.log.system
    if values:
        with contextlib.suppress(KeyError, ValueError):
            accelerator = _accelerator(values.get("ACCELERATOR", ""))
            return System(accelerator, int(values["DGXNNODES"]), int(values["DGXNGPU"]))
    folder = run.path.absolute().parent.parent  # <tree>/results/<system>, of .../<system>/llama2_70b_lora/result_0.txt
    file = folder.parent.parent / "systems" / f"{folder.name}.json"
    if file.is_file():
        with contextlib.suppress(ValueError):
            described = json.loads(file.read_text(errors="replace"))
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        accelerator = _accelerator(str(described.get("accelerator_model_name", "")))
        return System(accelerator, int(described["number_of_nodes"]), int(described["accelerators_per_node"]))
    name = str(run.values.get("config_filename", ""))
    shape = re.search(r"_(\d+)x(\d+)x\d+", name)
    return System(_accelerator(name), *(int(shape[1]), int(shape[2])) if shape else ())


def job_environment(log: Path) -> dict[str, str]:
    """What run.sub noted of the job beside the log; empty without that file."""
    file = log.with_suffix(".env")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _accelerator(text: str) -> str:
    return next((name for name in sorted(ACCELERATORS, key=len, reverse=True) if name in text.upper()), "")


def group(runs: Iterable[Run], root: Path) -> list[Result]:
    """Runs by folder and config."""
    results: list[Result] = []
    for run in runs:
        relative = run.path.parent.relative_to(root) if root.is_dir() else Path()
        name = root.resolve().name if relative == Path() else str(relative)
        result = next((r for r in results if r.name == name and r.fits(run)), None)
        if result is None:
            result = Result(name)
            results.append(result)
        result.add(run)
    return results


# ---- Score -----------------------------------------------------------------------------------------------------------


def official_score(result: Result, ruleset: str) -> Score:
    """Olympic mean, RCP verdict and scaling by mlperf_logging's own programs, on a copy: they write where they read."""
    count, needed = len(result.runs), rules.RUNS_PER_RESULT
    if any(run.rehearsal for run in result.runs):
        return Score(reason=f"score: needs {needed} runs of the 70B model; a rehearsal has none")
    if count != needed:
        return Score(reason=f"score: needs {needed} runs, has {count}")
    try:
        return _official_score(result, ruleset)
    except Exception as error:  # the official programs compute on whatever the logs hold
        return Score(reason=f"score: none; mlperf_logging stopped: {error}")


def _official_score(result: Result, ruleset: str) -> Score:
    from mlperf_logging.rcp_checker import rcp_checker
    from mlperf_logging.result_summarizer import result_summarizer

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, quiet_mlperf(), cached_rules(), contextlib.redirect_stdout(said):
        for index, run in enumerate(result.runs):
            Path(folder, f"result_{index}.txt").write_text(_needed_lines(run))
        passed, message = None, "open division: not checked"
        if result.config.get("submission_division") == "closed":
            passed, message, _ = rcp_checker.check_directory(
                folder, "training", ruleset, False, False, rcp_pass="pruned_rcps", set_scaling=True
            )
        minutes, _, scaling = result_summarizer._compute_strong_score_standalone(
            rules.NAME, result.name, False, folder, "training", ruleset
        )
    if minutes is None:
        return Score(rcp=message, rcp_passed=passed, reason="score: none; " + " ".join(said.getvalue().split()))
    score = Score(minutes, minutes / scaling, scaling, message, passed)
    sequences = sorted(run.sequences_to_converge or math.inf for run in result.runs)[1:-1]
    score.sequences = sum(sequences) / len(sequences)
    if expected := convergence.expected(result.config["global_batch_size"]):
        score.reference_sequences, score.bound_sequences = expected.reference, expected.bound
    return score


def _needed_lines(run: Run) -> str:
    """What the official programs look at, in short lines: their parsing takes time quadratic in a line's length."""
    rows = []
    for event in run.log.events:
        if event.key not in ("train_loss", "tracked_stats"):
            metadata = {key: value for key, value in event.metadata.items() if key not in ("file", "lineno")}
            fields = {"time_ms": event.time_ms, "key": event.raw_key, "value": event.value, "metadata": metadata}
            rows.append(f":::MLLOG {json.dumps(fields)}\n")
    damage = [":::MLLOG damaged\n"] if run.log.damaged else []  # so that they refuse the run all the same
    return "".join(rows + damage)
