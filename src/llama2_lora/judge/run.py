"""One run, that is one log file: its figures. Times come from the log's own clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.findings import Finding
from llama2_lora.gpus import ACCELERATORS
from llama2_lora.judge.blocks import Block, training_blocks
from llama2_lora.judge.power import Power
from llama2_lora.judge.published import envelope
from llama2_lora.judge.runlog import MOST_SEQUENCES, Event, RunLog, number, samples_count

MODEL_TFLOP_PER_SEQUENCE = 2598  # forward and backward of 8,192 tokens with LoRA on the 70B; NVIDIA's figure
# FP4 runs go over to FP8 before the end ("healing"): the published ones got 1.4 to 2.3 times slower there
HEALED_SLOWDOWN = 1.15
USUAL_TRAIN_LOSS = 1.3  # median over the second half of a run: 1.27 to 1.34 in twelve published logs with GBS 8
LEAST_TRAIN_LOSSES = 4


@dataclass(frozen=True)
class System:
    """What is known of the machine, from files beside the log or the log itself."""

    accelerator: str = ""  # key of ACCELERATORS, or empty
    nodes: int | None = None
    per_node: int | None = None
    name: str = ""  # as its owner calls it

    @property
    def accelerators(self) -> int | None:
        return self.nodes * self.per_node if self.nodes and self.per_node else None


@dataclass
class Run:
    """One log file's figures. Times in seconds unless the name says otherwise; None: the log does not tell."""

    log: RunLog
    system: System = field(default_factory=System)
    power: Power | None = None
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
        """A run with a small model: it is judged, but not against the 70B's figures."""
        return str(self.values.get("submission_platform", "")).startswith(("CPU rehearsal", "GPU rehearsal"))

    @cached_property
    def evaluations(self) -> list[tuple[int, float]]:
        """(training sequences so far, evaluation loss in nats)"""
        points = ((samples_count(e), number(e.value)) for e in self.events("eval_accuracy"))
        return [(s, loss) for s, loss in points if s is not None and loss is not None]

    @cached_property
    def train_losses(self) -> list[tuple[int, float]]:
        """(training sequences so far, training loss) where a line gives both."""
        known = zip(self.log.train_losses.sequences, self.log.train_losses.losses, strict=True)
        return [(int(s), loss) for s, loss in known if not math.isnan(s) and not math.isnan(loss)]

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
    def eval_durations(self) -> list[float]:
        """Seconds of each evaluation."""
        found, opened = [], None
        for event in self.log.events:
            if event.key == "eval_start":
                opened = event
            elif event.key == "eval_stop" and opened:
                found.append((event.time_ms - opened.time_ms) / 1e3)
                opened = None
        return found

    @property
    def eval_seconds(self) -> float:
        return sum(self.eval_durations)

    @cached_property
    def blocks(self) -> list[Block]:
        return training_blocks(self.log.events, self.gbs)

    @cached_property
    def samples_per_second(self) -> float | None:
        """Training throughput, sequences/s, evaluation left out."""
        seconds = sum(block.seconds for block in self.blocks)
        return sum(block.sequences for block in self.blocks) / seconds if seconds else None

    @property
    def step_seconds(self) -> float | None:
        return self.gbs / self.samples_per_second if self.gbs and self.samples_per_second else None

    @property
    def eval_share(self) -> float | None:
        return self.eval_seconds / (self.train_minutes * 60) if self.train_minutes else None

    @cached_property
    def healed(self) -> bool:
        """True where training and evaluation both got slower for good, as a run does that leaves FP4 for FP8."""
        paces = [block.seconds / block.sequences for block in self.blocks]
        evals = self.eval_durations
        if len(paces) < 3 or len(evals) < 3:
            return False
        usual, usual_eval = statistics.median(paces[: len(paces) // 2 + 1]), statistics.median(evals[: len(evals) // 2 + 1])
        return paces[-1] > HEALED_SLOWDOWN * usual and evals[-1] > HEALED_SLOWDOWN * usual_eval

    @cached_property
    def precision(self) -> str | None:
        """Of the linear layers: what the log says (6.0.0 and later), fp4 where the run was healed; None: not known."""
        text = str(self.values.get("lowest_numerical_precision_in_linear") or "").lower()
        for name in ("fp4", "fp8", "bf16", "bfloat16", "fp16", "fp32"):
            if name in text:
                return name.replace("bfloat16", "bf16")
        return "fp4" if self.healed else None

    @property
    def parallelism(self) -> dict[str, int]:
        """TP, PP, CP and so on, where the log says (6.0.0 and later)."""
        names = {"TP": "tensor", "PP": "pipeline", "CP": "context", "EP": "expert"}
        sizes = {short: self.values.get(f"{name}_parallelism") for short, name in names.items()}
        return {short: size for short, size in sizes.items() if type(size) is int}

    @cached_property
    def train_loss_factor(self) -> float | None:
        """Power of two by which the training loss is above (or below) what it should be; None: too little to say.

        A submission that adds the losses of its context ranks, or divides them, logs CP times the loss. The first quarter is
        left out, where the loss falls; a run whose evaluations are far off the published ones has a loss of its own.
        """
        losses = [loss for loss in self.log.train_losses.losses if not math.isnan(loss) and loss > 0]
        losses = losses[max(1, len(losses) // 4) :]
        astray = [loss for _, loss in self.evaluations if not 0.85 < loss < 1.15]
        if self.rehearsal or astray or len(losses) < LEAST_TRAIN_LOSSES:
            return None
        return 2.0 ** round(math.log2(statistics.median(losses) / USUAL_TRAIN_LOSS))

    def progress(self) -> tuple[int, float, float | None] | None:
        """(sequences so far, seconds since run_start, sequences/s lately) of a run that is under way."""
        start, columns = self.first("run_start"), self.log.train_losses
        if start is None or not self.train_losses:
            return None
        stops = [event.time_ms for event in self.events("eval_stop")]
        points = [(t, s) for t, s in zip(columns.times_ms, columns.sequences, strict=True) if not math.isnan(s)]
        recent = [point for point in points if not stops or point[0] >= stops[-1]]  # the time of an evaluation is no training
        if len(recent) < 2:
            before = stops[-2] if len(stops) > 1 else 0.0
            recent = [point for point in points if before <= point[0] < stops[-1]] if stops else []
        pace = None
        if len(recent) > 1 and recent[-1][0] > recent[-2][0]:
            pace = (recent[-1][1] - recent[-2][1]) / (recent[-1][0] - recent[-2][0]) * 1e3
        return self.train_losses[-1][0], (self.log.last_time_ms - start.time_ms) / 1e3, pace

    def mfu(self, peak_tflops: float | None = None) -> float | None:
        """Model FLOP utilization of training, a share; `peak_tflops`: of one accelerator, by default its dense bf16 peak.

        The default holds also where FP8 or FP4 ran, as in published comparisons; it can pass 1 there.
        """
        known = ACCELERATORS.get(self.system.accelerator)
        peak = peak_tflops or (known.bf16_tflops if known else None)
        if self.rehearsal or not (peak and self.system.accelerators and self.samples_per_second):
            return None
        return self.samples_per_second * MODEL_TFLOP_PER_SEQUENCE / (self.system.accelerators * peak)

    @property
    def gpu_hours(self) -> float | None:
        """Accelerator hours from init_start (or run_start) to run_stop."""
        if not self.system.accelerators or self.train_minutes is None:
            return None
        return self.system.accelerators * ((self.init_minutes or 0.0) + self.train_minutes) / 60

    @property
    def energy_kwh(self) -> float | None:
        """Energy to target, where power was measured."""
        if self.power is None or self.train_minutes is None:
            return None
        return self.power.mean_watts / 1e3 * self.train_minutes / 60

    def published_difference(self) -> float | None:
        """Mean over evaluations of loss minus the published median, nats; None without an envelope."""
        medians = {row.sequences: row.median for row in envelope(self.gbs, self.precision) if row.whole}
        differences = [loss - medians[s] for s, loss in self.evaluations if s in medians]
        return None if self.rehearsal or not differences else statistics.fmean(differences)

    def _between(self, start: str, stop: str) -> float | None:
        a, b = self.first(start), self.first(stop)
        return (b.time_ms - a.time_ms) / 1e3 if a and b else None


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
        "train_loss_factor": run.train_loss_factor,
        "precision": run.precision,
        "parallelism": " ".join(f"{name}{size}" for name, size in run.parallelism.items()) or None,
        "accelerator": run.system.accelerator or None,
        "accelerators": run.system.accelerators,
        "gpu_hours": run.gpu_hours,
        "mean_kilowatts": run.power.mean_watts / 1e3 if run.power else None,
        "energy_kwh": run.energy_kwh,
    }
