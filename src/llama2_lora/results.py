"""Logs -> runs -> results: when, how fast and whether each run converged, and the score of ten.

A run is one log file. A result is the runs of one folder with one config. Times come from the log's own clock.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from llama2_lora import benchmark
from llama2_lora.runlog import Event, RunLog, quiet_mlperf, read_log

MODEL_TFLOP_PER_SEQUENCE = 2598  # forward and backward of 8,192 tokens with LoRA on the 70B; NVIDIA's figure
# Dense bf16 peak of one accelerator, TFLOP/s; makers' data sheets. MFU is against this also where FP8 or FP4 ran.
PEAK_TFLOPS = {
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "B300": 2250,
    "GB200": 2450,
    "GB300": 2450,
    "MI300X": 1307,
    "MI325X": 1307,
    "MI355X": 2516,
}
CONFIG_KEYS = (
    *("submission_platform", "submission_org", "submission_division", "global_batch_size", "gradient_accumulation_steps"),
    *("opt_base_learning_rate", "opt_learning_rate_training_steps", "opt_learning_rate_warmup_factor"),
    *("opt_adamw_weight_decay", "opt_gradient_clip_norm", "lora_rank", "lora_alpha", "config_filename"),
    *("micro_batch_size", "tensor_parallelism", "pipeline_parallelism", "context_parallelism"),
)


@dataclass(frozen=True)
class System:
    """What is known of the machine, from files beside the log or the log itself."""

    accelerator: str = ""  # key of PEAK_TFLOPS, or empty
    nodes: int | None = None
    per_node: int | None = None

    @property
    def accelerators(self) -> int | None:
        return self.nodes * self.per_node if self.nodes and self.per_node else None


@dataclass(frozen=True)
class Finding:
    """Something to say of a run or a result. An error breaks a rule; a warning should be looked at; a note explains."""

    level: str  # error, warning or note
    code: str  # stable name of the check
    text: str
    where: str = ""  # file, with line where there is one


@dataclass
class Run:
    """One log file's figures. Times in seconds unless the name says otherwise; None: the log does not tell."""

    log: RunLog
    system: System = field(default_factory=System)
    findings: list[Finding] = field(default_factory=list)
    compliance: list[str] = field(default_factory=list)  # the official checker's messages; empty: passed

    @property
    def path(self) -> Path:
        return self.log.path

    @cached_property
    def values(self) -> dict[str, Any]:
        """First value of every key."""
        first: dict[str, Any] = {}
        for event in self.log.events:
            first.setdefault(event.key, event.value)
        return first

    def events(self, key: str) -> Iterator[Event]:
        return (event for event in self.log.events if event.key == key)

    def first(self, key: str) -> Event | None:
        return next(self.events(key), None)

    @property
    def gbs(self) -> int | None:
        """Global batch size, sequences."""
        value = self.values.get("global_batch_size")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def seed(self) -> Any:
        return self.values.get("seed")

    @property
    def rehearsal(self) -> bool:
        """A run on a CPU with a small model: it is judged, but not against the 70B's figures."""
        return str(self.values.get("submission_platform", "")).startswith("CPU rehearsal")

    @cached_property
    def evaluations(self) -> list[tuple[int, float]]:
        """(training sequences so far, evaluation loss in nats)"""
        points = ((samples_count(e), number(e.value)) for e in self.events("eval_accuracy"))
        return [(s, loss) for s, loss in points if s is not None and loss is not None]

    @cached_property
    def train_losses(self) -> list[tuple[int, float]]:
        points = ((samples_count(e), number(e.value)) for e in self.events("train_loss"))
        return [(s, loss) for s, loss in points if s is not None and loss is not None]

    @property
    def sequences_to_converge(self) -> int | None:
        return next((s for s, loss in self.evaluations if 0 < loss <= benchmark.TARGET_LOSS), None)

    @property
    def reported_status(self) -> str | None:
        stop = self.first("run_stop")
        return str(stop.metadata.get("status")) if stop else None

    @property
    def status(self) -> str:
        if self.first("run_start") is None:
            return "never started"
        if self.first("run_stop") is None:
            return "unfinished"
        return "converged" if self.sequences_to_converge and self.reported_status == "success" else "not converged"

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    @property
    def complied(self) -> bool:
        """The official checker and ours found no broken rule."""
        return not self.compliance and not any(f.level == "error" for f in self.findings)

    @property
    def train_minutes(self) -> float | None:
        """Time to train: what is scored."""
        return _minutes(self._between("run_start", "run_stop"))

    @property
    def init_minutes(self) -> float | None:
        return _minutes(self._between("init_start", "init_stop"))

    @cached_property
    def eval_seconds(self) -> float:
        return sum(stop.time_ms - start.time_ms for start, stop, _ in self._intervals("eval")) / 1e3

    @cached_property
    def blocks(self) -> list[tuple[float, float, int]]:
        """Training between evaluations: (seconds since run_start at its end, duration, sequences trained)."""
        start = self.first("run_start")
        origin = start.time_ms / 1e3 if start else 0.0
        found = []
        for opened, closed, rest in self._intervals("block"):
            before = samples_count(opened) or 0
            # block_stop repeats its start's count in some logs and has its own in others: the next event has the new one
            after = next((s for e in rest if e.key in _AFTER_BLOCK and (s := samples_count(e)) is not None), before)
            seconds = (closed.time_ms - opened.time_ms) / 1e3
            if seconds > 0 and after > before:
                found.append((closed.time_ms / 1e3 - origin, seconds, after - before))
        return found

    @cached_property
    def samples_per_second(self) -> float | None:
        """Training throughput, sequences/s, evaluation left out."""
        seconds = sum(duration for _, duration, _ in self.blocks)
        return sum(count for *_, count in self.blocks) / seconds if seconds else None

    @property
    def step_seconds(self) -> float | None:
        return self.gbs / self.samples_per_second if self.gbs and self.samples_per_second else None

    @property
    def eval_share(self) -> float | None:
        return self.eval_seconds / (self.train_minutes * 60) if self.train_minutes else None

    def mfu(self, peak_tflops: float | None = None) -> float | None:
        """Model FLOP utilization of training against the dense bf16 peak, a share; `peak_tflops`: per accelerator."""
        peak = peak_tflops or PEAK_TFLOPS.get(self.system.accelerator)
        if self.rehearsal or not (peak and self.system.accelerators and self.samples_per_second):
            return None
        return self.samples_per_second * MODEL_TFLOP_PER_SEQUENCE / (self.system.accelerators * peak)

    def published_difference(self) -> float | None:
        """Mean over evaluations of loss minus the published median, nats; None without an envelope."""
        medians = {row.sequences: row.median for row in envelope(self.gbs)}
        differences = [loss - medians[s] for s, loss in self.evaluations if s in medians]
        return None if self.rehearsal or not differences else statistics.fmean(differences)

    def _between(self, start: str, stop: str) -> float | None:
        a, b = self.first(start), self.first(stop)
        return (b.time_ms - a.time_ms) / 1e3 if a and b else None

    def _intervals(self, kind: str) -> Iterator[tuple[Event, Event, Iterator[Event]]]:
        """Each `kind`_start with the next `kind`_stop, and what follows it."""
        opened: Event | None = None
        for index, event in enumerate(self.log.events):
            if event.key == f"{kind}_start":
                opened = event
            elif event.key == f"{kind}_stop" and opened:
                yield opened, event, islice(self.log.events, index + 1, None)
                opened = None


_AFTER_BLOCK = ("eval_start", "eval_accuracy", "block_start", "run_stop")


def samples_count(event: Event) -> int | None:
    count = event.metadata.get("samples_count")
    return int(count) if isinstance(count, (int, float)) else None


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 60


def figures(run: Run, peak_tflops: float | None = None) -> dict[str, Any]:
    """A run's row in every output."""
    return {
        "run": run.path.name,
        "status": run.status,
        "complied": run.complied,
        "compliance": "passed" if not run.compliance else "failed",
        "train_minutes": run.train_minutes,
        "evaluations": len(run.evaluations),
        "final_loss": run.evaluations[-1][1] if run.evaluations else None,
        "sequences_to_converge": run.sequences_to_converge,
        "samples_per_second": run.samples_per_second,
        "step_seconds": run.step_seconds,
        "mfu": run.mfu(peak_tflops),
        "eval_share": run.eval_share,
        "init_minutes": run.init_minutes,
        "seed": run.seed,
        "loss_minus_published_median": run.published_difference(),
        "accelerator": run.system.accelerator or None,
        "accelerators": run.system.accelerators,
    }


@dataclass
class Score:
    """What the runs of a result are worth. `minutes` is None where there is no score; `reason` says why."""

    minutes: float | None = None
    olympic_minutes: float | None = None
    scaling: float | None = None
    rcp: str = ""  # the RCP checker's message
    rcp_passed: bool | None = None
    reason: str = ""


@dataclass
class Result:
    """Runs of one folder with one config."""

    name: str
    runs: list[Run]
    findings: list[Finding] = field(default_factory=list)
    score: Score = field(default_factory=Score)

    @property
    def ok(self) -> bool:
        return all(run.complied and run.converged for run in self.runs) and not any(f.level == "error" for f in self.findings)

    @property
    def config(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for run in self.runs:
            for key in CONFIG_KEYS:
                if key in run.values:
                    merged.setdefault(key, run.values[key])
        return merged


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
        return {
            "folder": str(self.folder),
            "ruleset": self.ruleset,
            "ok": self.ok,
            "results": [_result_dict(result, peak_tflops) for result in self.results],
            "findings": [vars(f) for f in self.all_findings()],
        }


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
        name = run.values.get("submission_benchmark", benchmark.NAME)
        if not run.log.events and not run.log.damaged:
            continue
        if name != benchmark.NAME:
            skipped.append(Finding("note", "other benchmark", f"left out: a log of {name}", str(path)))
            continue
        run.system = find_system(run)
        runs.append(run)
    return runs, skipped


def find_system(run: Run) -> System:
    """Accelerators of a run: run.sub's .env beside the log, else SYSJSON, systems/NAME.json or the config's name."""
    env, described = run.path.with_suffix(".env"), run.log.system
    if env.is_file():
        values = dict(line.split("=", 1) for line in env.read_text(errors="replace").splitlines() if "=" in line)
        with contextlib.suppress(KeyError, ValueError):
            accelerator = _accelerator(values.get("ACCELERATOR", ""))
            return System(accelerator, int(values["DGXNNODES"]), int(values["DGXNGPU"]))
    for parent in run.path.parents[1:3]:  # systems/<name>.json beside results/<name>/llama2_70b_lora/result_0.txt
        file = parent.parent / "systems" / f"{parent.name}.json"
        if file.is_file():
            with contextlib.suppress(ValueError):
                described = json.loads(file.read_text(errors="replace"))
    with contextlib.suppress(KeyError, ValueError, TypeError):
        accelerator = _accelerator(str(described.get("accelerator_model_name", "")))
        return System(accelerator, int(described["number_of_nodes"]), int(described["accelerators_per_node"]))
    name = str(run.values.get("config_filename", ""))
    shape = re.search(r"_(\d+)x(\d+)x\d+", name)
    return System(_accelerator(name), *(int(shape[1]), int(shape[2])) if shape else ())


def _accelerator(text: str) -> str:
    return next((name for name in sorted(PEAK_TFLOPS, key=len, reverse=True) if name in text.upper()), "")


def group(runs: Iterable[Run], root: Path) -> list[Result]:
    """Runs by folder and config. A value that a damaged log lacks fits any config."""
    results: list[Result] = []
    for run in runs:
        relative = run.path.parent.relative_to(root) if root.is_dir() else Path()
        name = root.resolve().name if relative == Path() else str(relative)
        fitting = (r for r in results if r.name == name and _fits(run, r))
        result = next(fitting, None)
        if result is None:
            result = Result(name, [])
            results.append(result)
        result.runs.append(run)
    return results


def _fits(run: Run, result: Result) -> bool:
    config = result.config
    return all(run.values[key] == config[key] for key in CONFIG_KEYS if key in run.values and key in config)


# ---- Published runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvelopeRow:
    """Evaluation loss of published runs with one GBS after `sequences` training sequences, nats."""

    gbs: int
    sequences: int
    runs: int
    p05: float
    median: float
    p95: float
    share_converged: float


def envelope(gbs: int | None) -> list[EnvelopeRow]:
    """Published convergence for a GBS; empty where none was published."""
    return [row for row in _all_envelopes() if row.gbs == gbs]


_envelopes: list[EnvelopeRow] = []


def _all_envelopes() -> list[EnvelopeRow]:
    if not _envelopes:
        text = (resources.files("llama2_lora") / "data" / "envelope.csv").read_text()
        for row in csv.DictReader(io.StringIO("".join(x for x in text.splitlines(True) if not x.startswith("#")))):
            whole = (int(row[name]) for name in ("gbs", "sequences", "runs"))
            shares = (float(row[name]) for name in ("p05", "median", "p95", "share_converged"))
            _envelopes.append(EnvelopeRow(*whole, *shares))
    return _envelopes


# ---- Score -----------------------------------------------------------------------------------------------------------


def official_score(result: Result, ruleset: str) -> Score:
    """Olympic mean, RCP verdict and scaling by mlperf_logging's own programs, on a copy: they write where they read."""
    count, needed = len(result.runs), benchmark.RUNS_PER_RESULT
    if any(run.rehearsal for run in result.runs):
        return Score(reason=f"score: needs {needed} runs of the 70B model; a rehearsal has none")
    if count != needed:
        return Score(reason=f"score: needs {needed} runs, has {count}")
    from mlperf_logging.rcp_checker import rcp_checker
    from mlperf_logging.result_summarizer import result_summarizer

    closed = result.config.get("submission_division") == "closed"
    with tempfile.TemporaryDirectory() as folder, quiet_mlperf(), contextlib.redirect_stdout(io.StringIO()) as said:
        for index, run in enumerate(result.runs):
            Path(folder, f"result_{index}.txt").write_text(_needed_lines(run))
        passed, message = None, "open division: not checked"
        if closed:
            passed, message, _ = rcp_checker.check_directory(
                folder, "training", ruleset, False, False, rcp_pass="pruned_rcps", set_scaling=True
            )
        minutes, _, scaling = result_summarizer._compute_strong_score_standalone(
            benchmark.NAME, result.name, False, folder, "training", ruleset
        )
    if minutes is None:
        return Score(rcp=message, rcp_passed=passed, reason="score: none; " + " ".join(said.getvalue().split()))
    return Score(minutes, minutes / scaling, scaling, message, passed)


def _needed_lines(run: Run) -> str:
    """The events that the official programs look at: curves make their parsing slow, noise and damage stop it."""
    kept = (e for e in run.log.events if e.key not in ("train_loss", "tracked_stats"))
    return "".join(f":::MLLOG {e.text}\n" for e in kept)
