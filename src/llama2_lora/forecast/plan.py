"""All that can be said of a config before it is submitted: plain values for scripts/preflight.py to print.

`plan()` takes settings that are legal in themselves and returns what they lead to, with findings: an `error` cannot work or
would be no result, a `warning` should be looked at. No torch, no files, no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llama2_lora.config import schedule
from llama2_lora.config.settings import Settings
from llama2_lora.findings import Finding, at_least, exit_status
from llama2_lora.forecast import advice, convergence, measured
from llama2_lora.forecast.convergence import Convergence
from llama2_lora.forecast.memory import Memory, memory_per_gpu
from llama2_lora.forecast.times import Times, times_of
from llama2_lora.gpus import accelerator_of
from llama2_lora.llama2 import LLAMA2_70B


@dataclass(frozen=True)
class RankGroup:
    """One dimension of the layout: its size, the group of rank 0, and whether all its groups stay within a node."""

    group: str  # TP, CP, DP or PP
    size: int
    ranks: tuple[int, ...]
    within_a_node: bool


@dataclass(frozen=True)
class BatchPlan:
    """Sequences of a step and where they go."""

    global_batch_size: int
    data_parallel: int
    minibs: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int  # tokens


@dataclass(frozen=True)
class Evaluations:
    """When the run evaluates, in steps and in training sequences."""

    every_steps: int
    steps: tuple[int, ...]
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class LearningRates:
    """The LR at the start, the end of the warm-up, each quarter and the expected end of the run."""

    base: float
    max_steps: int
    warmup_steps: int
    points: tuple[tuple[int, float], ...]  # step, LR


@dataclass(frozen=True)
class Plan:
    """What a config leads to. None: not forecast, as on a CPU or where the GPU is not known."""

    config: str
    platform: str
    rehearsal: bool
    accelerator: str | None
    layout: tuple[RankGroup, ...]
    batch: BatchPlan
    evaluation: Evaluations
    learning_rate: LearningRates
    convergence: Convergence | None
    expected_steps: float | None
    rules: tuple[Finding, ...]  # kept ones too
    forecast: Times | None
    memory: Memory | None
    findings: tuple[Finding, ...]  # what is wrong or should be looked at

    @property
    def go(self) -> bool:
        return exit_status(self.findings) == 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all of it, memory in GB."""
        return asdict(self) | {"memory": self.memory and self.memory.as_dict(), "go": self.go}


def plan(settings: Settings, rank: measured.Measured | None = None) -> Plan:
    """Everything of one config; `rank` is what scripts/measure.py saw of one of its ranks."""
    system, rehearsal = settings.system, settings.rehearsal
    part = None if rehearsal else accelerator_of(system.accelerator, system.name)
    reference = None if rehearsal else convergence.expected(settings.global_batch_size)
    memory = None if part is None else memory_per_gpu(settings, LLAMA2_70B, part)
    about_rank = () if rank is None else tuple(measured.check(rank, settings, part.name if part else ""))
    if exit_status(about_rank):
        rank = None  # another rank's figures
    if rank is not None and memory is not None:
        memory = measured.memory_of(rank, memory)
    steps = _steps_needed(settings, reference)
    times = None
    if part and steps and reference:
        times = times_of(settings, part, steps, reference.deviation / reference.mean, rank)
    kept = () if rehearsal else tuple(advice.rule_checks(settings))
    return Plan(
        config=system.name,
        platform=system.platform,
        rehearsal=rehearsal,
        accelerator=part.name if part else None,
        layout=tuple(layout(settings)),
        batch=_batch(settings),
        evaluation=_evaluations(settings),
        learning_rate=_learning_rates(settings, steps),
        convergence=reference,
        expected_steps=steps,
        rules=kept,
        forecast=times,
        memory=memory,
        findings=(*at_least(kept, "warning"), *about_rank, *advice.advise(settings, reference, part, memory, times)),
    )


# ---- Ranks, batch, schedule ------------------------------------------------------------------------------------------


def layout(settings: Settings) -> Iterator[RankGroup]:
    """Megatron's order: TP runs fastest, then CP, DP and PP (parallel_state.initialize_model_parallel, tp-cp-ep-dp-pp)."""
    p, node = settings.parallel, settings.system.gpus_per_node
    world = settings.system.nodes * node
    stride = 1
    for name, size in (("TP", p.tp), ("CP", p.cp), ("DP", settings.data_parallel_size), ("PP", p.pp)):
        groups = [range(first, first + size * stride, stride) for first in range(world) if first // stride % size == 0]
        inside = all(group[0] // node == group[-1] // node for group in groups)
        yield RankGroup(name, size, tuple(groups[0]), inside)
        stride *= size


def _batch(settings: Settings) -> BatchPlan:
    b = settings.batch
    return BatchPlan(
        global_batch_size=settings.global_batch_size,
        data_parallel=settings.data_parallel_size,
        minibs=b.minibs,
        micro_batch_size=b.micro,
        gradient_accumulation_steps=b.gradient_accumulation_steps,
        sequence_length=b.sequence_length,
    )


def _evaluations(settings: Settings) -> Evaluations:
    steps, gbs = settings.eval_steps, settings.global_batch_size
    return Evaluations(settings.eval_every_steps, tuple(steps), tuple(step * gbs for step in steps))


def _learning_rates(settings: Settings, steps_needed: float | None) -> LearningRates:
    o = settings.optimization
    steps = {o.warmup_steps, *(o.max_steps * i // 4 for i in range(5))} | ({round(steps_needed)} if steps_needed else set())
    points = tuple((s, schedule.learning_rate(s, o.lr, o.max_steps, o.warmup_steps)) for s in sorted(steps))
    return LearningRates(o.lr, o.max_steps, o.warmup_steps, points)


def _steps_needed(settings: Settings, reference: Convergence | None) -> float | None:
    """Steps that a run takes on average if it converges as the reference does."""
    if reference is None:
        return None
    return max(reference.mean / settings.global_batch_size, settings.eval_steps.start)
