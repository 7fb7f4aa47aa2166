"""All that can be said of a config before it is submitted: plain values for scripts/preflight.py to print.

`plan()` takes settings that are legal in themselves and returns what they lead to, with findings: an `error` cannot work or
would be no result, a `warning` should be looked at. No torch, no files, no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llama2_lora.config import rules, schedule
from llama2_lora.config.conflicts import FIXED_IN_CLOSED
from llama2_lora.config.settings import FIELDS, Settings
from llama2_lora.config.shapes import shape_conflicts
from llama2_lora.config.values import walltime_minutes
from llama2_lora.findings import Finding, at_least, exit_status
from llama2_lora.forecast import convergence, measured
from llama2_lora.forecast.convergence import Convergence
from llama2_lora.forecast.generations import of_this_stack
from llama2_lora.forecast.memory import GB, Memory, memory_per_gpu, what_would_fit
from llama2_lora.forecast.timing import Interval, Work, forecast, forecast_of_rank
from llama2_lora.gpus import Accelerator, accelerator_of
from llama2_lora.llama2 import LLAMA2_70B

# Published v4.1 and v5.0 entries: 0.5 to 6.8 minutes, median 1.5 (benchmarks/published_results.csv).
INIT_MINUTES = 3.0
# (TP, CP) of published entries, by part and precision, PP 1 and MBS 1 (benchmarks/published_results.csv; B300 in FP4: v6.0)
PUBLISHED_LAYOUTS = {
    ("H100", "fp8"): {(4, 1), (4, 2)},
    ("H200", "fp8"): {(1, 2), (2, 1), (4, 1), (4, 2)},
    ("H200-NVL", "fp8"): {(1, 2)},
    ("GH200", "fp8"): {(4, 1)},
    ("B200", "fp8"): {(1, 1), (1, 2), (1, 4), (1, 8)},
    ("B200", "fp4"): {(1, 1), (1, 2)},
    ("GB200", "fp8"): {(1, 1), (1, 2), (1, 4), (1, 8)},
    ("GB200", "fp4"): {(1, 2)},
    ("B300", "fp8"): {(1, 1)},
    ("B300", "fp4"): {(1, 1)},
    ("GB300", "fp8"): {(1, 8)},
    ("GB300", "fp4"): {(1, 1)},
    ("MI300X", "fp8"): {(1, 1), (2, 1), (4, 1)},
    ("MI325X", "fp8"): {(1, 1), (2, 1)},
    ("MI355X", "fp8"): {(1, 1)},
    ("MI355X", "fp4"): {(1, 1)},
}


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
class Times:
    """The forecast of a run and of the job, against its time limit."""

    step_seconds: Interval
    eval_seconds: Interval
    run_minutes: Interval
    job_minutes: Interval
    samples_per_second: float
    evaluations: float
    walltime_minutes: float
    like_published: bool  # whether published runs of this kind were there to fit
    not_covered: str  # why not
    generation: str  # of the software; empty where the part's published steps did not change with it
    generation_reason: str
    gpus: int
    measured: str = ""  # the GPU on which one rank was measured; empty: a forecast from the fit alone
    fp4_step_seconds: Interval | None = None  # the two phases of a run in FP4
    healed_step_seconds: Interval | None = None

    def gpu_hours(self) -> tuple[Interval, Interval]:
        """Of one run with its initialization, and of the job."""
        per_run = (INIT_MINUTES + minutes for minutes in (self.run_minutes.low, self.run_minutes.middle, self.run_minutes.high))
        job = (self.job_minutes.low, self.job_minutes.middle, self.job_minutes.high)
        run, whole = (Interval(*(self.gpus * m / 60 for m in minutes)) for minutes in (per_run, job))
        return run, whole


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
    system, rehearsal = settings.system, _rehearsal(settings)
    part = None if rehearsal else accelerator_of(system.accelerator, system.name)
    reference = None if rehearsal else convergence.expected(settings.global_batch_size)
    memory = None if part is None else memory_per_gpu(settings, LLAMA2_70B, part)
    about_rank = () if rank is None else tuple(measured.check(rank, settings, part.name if part else ""))
    if exit_status(about_rank):
        rank = None  # another rank's figures
    if rank is not None and memory is not None:
        memory = measured.memory_of(rank, memory)
    steps = _steps_needed(settings, reference)
    times = (
        None
        if part is None or steps is None or reference is None
        else _times(settings, part, steps, reference.deviation / reference.mean, rank)
    )
    kept = () if rehearsal else tuple(rule_checks(settings))
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
        findings=(
            *at_least(kept, "warning"),
            *about_rank,
            *_shape_findings(settings),
            *_convergence_findings(settings, reference),
            *_memory_findings(settings, part, memory),
            *_time_findings(settings, times),
            *_submission_findings(settings),
        ),
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


def _rehearsal(settings: Settings) -> bool:
    return settings.rehearsal


# ---- Rules -----------------------------------------------------------------------------------------------------------


def rule_checks(settings: Settings) -> Iterator[Finding]:
    """What the rules ask and what the config does. Settings already refuse most violations in the closed division."""
    gbs, run, trials = settings.global_batch_size, settings.run, settings.system.trials
    changed = [name for name, fixed in FIXED_IN_CLOSED.items() if settings.value(name) != fixed]
    closed = settings.submission.division == "closed"
    yield _rule("division", closed, settings.submission.division, "§4")
    yield _rule("fixed hyperparameters", not changed, ", ".join(changed) or "as the rules fix them", "§9.1")
    legal = schedule.eval_steps(gbs, settings.optimization.max_steps)
    text = f"from step {settings.eval_steps.start}, every {settings.eval_every_steps}"
    yield _rule("evaluation cadence", settings.eval_steps == legal, text, "§9.4")
    skip = settings.evaluation.skip
    skip = schedule.skipped_evaluations(gbs) if skip is None else skip
    yield _rule("evaluations skipped", skip == schedule.skipped_evaluations(gbs), f"{skip} at GBS {gbs}", "§9.4")
    text = "a new one from /dev/urandom for every run" if run.seed is None else f"{run.seed} for all {trials} runs"
    yield _rule("seed", run.seed is None or trials == 1, text, "§5.1", broken="error" if closed else "warning")
    enough = trials == rules.RUNS_PER_RESULT
    yield _rule("runs", enough, f"{trials}; a result takes {rules.RUNS_PER_RESULT}", "§12")


def _rule(name: str, kept: bool, text: str, paragraph: str, broken: str = "warning") -> Finding:
    return Finding("ok" if kept else broken, name, f"{name}: {text}", paragraph)


def _shape_findings(settings: Settings) -> Iterator[Finding]:
    if not _rehearsal(settings):  # whose model is the checkpoint's: preflight --inside and train.py look at it
        yield from (Finding("error", "model", problem) for problem in shape_conflicts(settings, LLAMA2_70B))


# ---- Convergence, memory, time ---------------------------------------------------------------------------------------


def _convergence_findings(settings: Settings, reference: Convergence | None) -> Iterator[Finding]:
    gbs, steps, first = settings.global_batch_size, settings.optimization.max_steps, settings.eval_steps.start
    if steps < first:
        yield Finding(
            "error", "convergence", f"MAX_STEPS={steps}: the first evaluation is after step {first}; no run can succeed"
        )
    if _rehearsal(settings):
        return
    if reference is None:
        largest = convergence.POINTS[-1].gbs
        text = f"GBS {gbs}: the largest reference is {largest}; the checker fails a submission above it"
        yield Finding("warning", "convergence", text)
    elif first <= steps < (likely := (reference.mean + 2 * reference.deviation) / gbs):
        text = f"the reference takes {reference.mean / gbs:.0f} steps on average, some runs {likely:.0f}"
        yield Finding("warning", "convergence", f"MAX_STEPS={steps}: {text}")
    if gbs < convergence.POINTS[0].gbs:
        text = f"GBS {gbs}: below the smallest reference, {convergence.POINTS[0].gbs}, which counts instead"
        yield Finding("warning", "convergence", text)


def _memory_findings(settings: Settings, part: Accelerator | None, found: Memory | None) -> Iterator[Finding]:
    if _rehearsal(settings):
        return
    if part is None or found is None:
        text = "the GPU is not known: set ACCELERATOR, or name it in DGXSYSTEM, to forecast memory and time"
        yield Finding("warning", "accelerator", text)
        return
    need = f"{found.total / GB:.1f} GB are needed, {part.name} has {found.capacity / GB:.1f}"
    if found.verdict == "tight":
        yield Finding("warning", "memory", f"memory is tight: {need}; the account is good to some percent")
    if found.verdict in ("over", "no"):
        fix = what_would_fit(settings, LLAMA2_70B, part) or "more TP, CP or PP"
        need += f"; {fix} would make room"
    if found.verdict in ("over", "no"):
        yield _memory_refusal(settings, part, found, need)


def _memory_refusal(settings: Settings, part: Accelerator, found: Memory, need: str) -> Finding:
    """This software cannot hold the config: an error, unless submissions ran the layout, or the user will try."""
    p, precision = settings.parallel, settings.precision
    kind = "fp4" if precision.fp4 else "fp8" if precision.fp8 else "bf16"
    if found.verdict == "over" and p.pp == 1 and (p.tp, p.cp) in PUBLISHED_LAYOUTS.get((part.name, kind), ()):
        ran = f"submissions ran TP{p.tp} CP{p.cp} in {kind.upper()} on {part.name}"
        least = f"{ran}, with {found.least / GB:.0f} GB by other software"
        return Finding("warning", "memory", f"will likely run out of memory: {need}; {least}")
    if settings.system.memory_check == "warn":
        return Finding("warning", "memory", f"does not fit: {need}; MEMORY_CHECK=warn: go in spite of it")
    return Finding("error", "memory", f"does not fit: {need}; MEMORY_CHECK=warn goes on in spite of this account")


def _times(settings: Settings, part: Accelerator, steps: float, spread: float, rank: measured.Measured | None = None) -> Times:
    """spread: of the reference's runs around their mean, as a share of it."""
    gbs, trials = settings.global_batch_size, settings.system.trials
    generation = of_this_stack(part)
    work = Work.from_settings(settings, part, generation.name)
    evaluations = (steps - settings.eval_steps.start) / settings.eval_every_steps + 1
    run_of = (work, steps * gbs, evaluations, spread)
    found = forecast(*run_of) if rank is None else forecast_of_rank(*run_of, rank)
    run = found["run_minutes"]
    return Times(
        **found,
        job_minutes=Interval(*(trials * (minutes + INIT_MINUTES) for minutes in (run.low, run.middle, run.high))),
        samples_per_second=gbs / found["step_seconds"].middle,
        evaluations=evaluations,
        walltime_minutes=walltime_minutes(settings.system.walltime),
        like_published=work.seen,
        measured=rank.gpu if rank else "",
        not_covered=work.not_covered,
        generation=generation.name if work.kind.endswith(generation.name) else "",
        generation_reason=generation.reason,
        gpus=work.gpus,
    )


def _time_findings(settings: Settings, times: Times | None) -> Iterator[Finding]:
    if times is None:
        return
    limit, job, run, walltime = times.walltime_minutes, times.job_minutes, times.run_minutes, settings.system.walltime
    if limit < run.low + INIT_MINUTES:
        yield Finding("error", "walltime", f"WALLTIME={walltime}: one run is expected to take {run.middle:.0f} minutes")
    elif limit < job.high:
        text = f"{settings.system.trials} runs are expected to take {job.middle:.0f} minutes, up to {job.high:.0f}"
        yield Finding("warning", "walltime", f"WALLTIME={walltime}: {text}")


def _submission_findings(settings: Settings) -> Iterator[Finding]:
    """What package_submission.py would refuse once ten runs are paid for."""
    s = settings.submission
    if _rehearsal(settings) or s.division != "closed" or settings.system.trials < rules.RUNS_PER_RESULT:
        return
    unset = [name for name in ("MLPERF_SUBMITTER", "MLPERF_SYSTEM_NAME") if settings.value(name) == FIELDS[name][1].default]
    if unset:
        text = f"{' and '.join(unset)}: not set: {settings.system.trials} runs of the closed division could not be submitted"
        yield Finding("warning", "submission", f"{text}; export it, or try with NEXP=1 first")
