"""One run, that is one log file: its figures. Times come from the log's own clock."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.gpus import ACCELERATORS
from llama2_lora.judge.published import envelope
from llama2_lora.judge.runlog import Event, RunLog

MODEL_TFLOP_PER_SEQUENCE = 2598  # forward and backward of 8,192 tokens with LoRA on the 70B; NVIDIA's figure
MOST_SEQUENCES = 10**9  # a count above this is damage


@dataclass(frozen=True)
class System:
    """What is known of the machine, from files beside the log or the log itself."""

    accelerator: str = ""  # key of ACCELERATORS, or empty
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
        return value if type(value) is int and 0 < value < MOST_SEQUENCES else None

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
        return next((s for s, loss in self.evaluations if 0 < loss <= rules.TARGET_LOSS), None)

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

    def progress(self) -> tuple[int, float, float | None] | None:
        """(sequences so far, seconds since run_start, sequences/s lately) of a run that is under way."""
        start, last, pace = self.first("run_start"), None, None
        for event in self.log.events:
            if event.key == "eval_stop":
                last = None  # the time of an evaluation is no training
            elif event.key == "train_loss" and (count := samples_count(event)):
                if last and event.time_ms > last.time_ms:
                    pace = (count - (samples_count(last) or 0)) / (event.time_ms - last.time_ms) * 1e3
                last = event
        if start is None or not self.train_losses:
            return None
        end = self.log.events[-1]
        return self.train_losses[-1][0], (end.time_ms - start.time_ms) / 1e3, pace

    def mfu(self, peak_tflops: float | None = None) -> float | None:
        """Model FLOP utilization of training, a share; `peak_tflops`: of one accelerator, by default its dense bf16 peak.

        The default holds also where FP8 or FP4 ran, as in published comparisons; it can pass 1 there.
        """
        known = ACCELERATORS.get(self.system.accelerator)
        peak = peak_tflops or (known.bf16_tflops if known else None)
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
    count = number(event.metadata.get("samples_count"))
    return int(count) if count is not None and 0 <= count < MOST_SEQUENCES else None


def number(value: Any) -> float | None:
    """A finite number, else None: logs of runs that diverged hold NaN."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < sys.float_info.max
    return float(value) if known else None


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
