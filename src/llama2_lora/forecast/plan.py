"""All that can be said of a config before it is submitted: plain values for scripts/preflight.py to print.

`plan()` takes settings that are legal in themselves and returns what they lead to, with findings: a `no-go` cannot work or
would be no result, a `warning` should be looked at. No torch, no files, no GPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llama2_lora.config import rules, schedule
from llama2_lora.config.settings import FIXED_IN_CLOSED, Settings, value_of, variables, walltime_minutes
from llama2_lora.forecast import convergence
from llama2_lora.forecast.convergence import Convergence
from llama2_lora.forecast.memory import Memory, memory_per_gpu, what_would_fit
from llama2_lora.forecast.timing import Interval, Work, forecast
from llama2_lora.gpus import Accelerator, accelerator_of
from llama2_lora.llama2 import LLAMA2_70B

# Published v4.1 and v5.0 entries: 0.5 to 6.8 minutes, median 1.5 (benchmarks/published_results.csv).
INIT_MINUTES = 3.0
GB = 1e9


@dataclass(frozen=True)
class Finding:
    level: str  # no-go or warning
    text: str


def plan(settings: Settings) -> dict[str, Any]:
    """Everything of one config, ready for JSON."""
    part = accelerator_of(settings.system) if settings.system.platform == "gpu" else None
    reference = convergence.expected(settings.global_batch_size)
    found = None if part is None else memory_per_gpu(settings, LLAMA2_70B, part)
    steps = _steps_needed(settings, reference)
    times = None if part is None or steps is None else _times(settings, part, steps)
    findings = [
        *_rule_findings(settings),
        *_convergence_findings(settings, reference),
        *_memory_findings(settings, part, found),
        *_time_findings(settings, times),
    ]
    return {
        "config": settings.system.name,
        "platform": settings.system.platform,
        "accelerator": part.name if part else None,
        "layout": layout(settings),
        "batch": _batch(settings),
        "evaluation": _evaluation(settings),
        "learning_rate": learning_rates(settings, steps),
        "convergence": None if reference is None or _rehearsal(settings) else asdict(reference) | {"steps": steps},
        "rules": [] if _rehearsal(settings) else list(rule_checks(settings)),
        "forecast": times,
        "memory": None if found is None else _memory(found),
        "findings": [asdict(finding) for finding in findings],
        "go": not any(finding.level == "no-go" for finding in findings),
    }


# ---- Ranks, batch, schedule ------------------------------------------------------------------------------------------


def layout(settings: Settings) -> list[dict[str, Any]]:
    """Per dimension: its size, the group of rank 0, and whether all groups stay within a node.

    Megatron's order: TP runs fastest, then CP, DP and PP (parallel_state.initialize_model_parallel, order tp-cp-ep-dp-pp).
    """
    p, node = settings.parallel, settings.system.gpus_per_node
    world = settings.system.nodes * node
    rows, stride = [], 1
    for name, size in (("TP", p.tp), ("CP", p.cp), ("DP", settings.data_parallel_size), ("PP", p.pp)):
        groups = [range(first, first + size * stride, stride) for first in range(world) if first // stride % size == 0]
        inside = all(group[0] // node == group[-1] // node for group in groups)
        rows.append({"group": name, "size": size, "ranks": list(groups[0]), "within_a_node": inside})
        stride *= size
    return rows


def _batch(settings: Settings) -> dict[str, int]:
    b = settings.batch
    return {
        "global_batch_size": settings.global_batch_size,
        "data_parallel": settings.data_parallel_size,
        "minibs": b.minibs,
        "micro_batch_size": b.micro,
        "gradient_accumulation_steps": b.gradient_accumulation_steps,
        "sequence_length": b.sequence_length,
    }


def _evaluation(settings: Settings) -> dict[str, Any]:
    steps, gbs = settings.eval_steps, settings.global_batch_size
    return {"every_steps": settings.eval_every_steps, "steps": list(steps), "sequences": [step * gbs for step in steps]}


def learning_rates(settings: Settings, steps_needed: float | None) -> dict[str, Any]:
    """The LR at the start, the end of the warm-up, each quarter and the expected end of the run."""
    o = settings.optimization
    steps = {o.warmup_steps, *(o.max_steps * i // 4 for i in range(5))} | ({round(steps_needed)} if steps_needed else set())
    points = [{"step": s, "lr": schedule.learning_rate(s, o.lr, o.max_steps, o.warmup_steps)} for s in sorted(steps)]
    return {"base": o.lr, "max_steps": o.max_steps, "warmup_steps": o.warmup_steps, "points": points}


def _steps_needed(settings: Settings, reference: Convergence | None) -> float | None:
    """Steps that a run takes on average if it converges as the reference does."""
    if reference is None or _rehearsal(settings):
        return None
    return max(reference.mean / settings.global_batch_size, settings.eval_steps.start)


def _rehearsal(settings: Settings) -> bool:
    return settings.system.platform == "cpu"


# ---- Rules -----------------------------------------------------------------------------------------------------------


def rule_checks(settings: Settings) -> Iterator[dict[str, Any]]:
    """What the rules ask and what the config does. Settings already refuses most violations in the closed division."""
    gbs, run, trials = settings.global_batch_size, settings.run, settings.system.trials
    changed = [name for name, fixed in FIXED_IN_CLOSED.items() if value_of(settings, name) != fixed]
    yield _rule("division", settings.submission.division == "closed", settings.submission.division, "§4")
    yield _rule("fixed hyperparameters", not changed, ", ".join(changed) or "as the rules fix them", "§9.1")
    legal = schedule.eval_steps(gbs, settings.optimization.max_steps)
    text = f"from step {settings.eval_steps.start}, every {settings.eval_every_steps}"
    yield _rule("evaluation cadence", settings.eval_steps == legal, text, "§9.4")
    skip = settings.evaluation.skip
    skip = schedule.skipped_evaluations(gbs) if skip is None else skip
    yield _rule("evaluations skipped", skip == schedule.skipped_evaluations(gbs), f"{skip} at GBS {gbs}", "§9.4")
    text = "a new one from /dev/urandom for every run" if run.seed is None else f"{run.seed} for all {trials} runs"
    yield _rule("seed", run.seed is None or trials == 1, text, "§5.1")
    enough = trials == rules.RUNS_PER_RESULT
    yield _rule("runs", enough, f"{trials}; a result takes {rules.RUNS_PER_RESULT}", "§12")


def _rule(name: str, kept: bool, text: str, paragraph: str) -> dict[str, Any]:
    return {"rule": name, "kept": kept, "text": text, "paragraph": paragraph}


def _rule_findings(settings: Settings) -> Iterator[Finding]:
    if _rehearsal(settings):
        return
    closed = settings.submission.division == "closed"
    for rule in rule_checks(settings):
        if not rule["kept"]:
            broken = closed and rule["rule"] == "seed"
            yield Finding("no-go" if broken else "warning", f"{rule['rule']}: {rule['text']} ({rule['paragraph']})")


# ---- Convergence, memory, time ---------------------------------------------------------------------------------------


def _convergence_findings(settings: Settings, reference: Convergence | None) -> Iterator[Finding]:
    gbs, steps, first = settings.global_batch_size, settings.optimization.max_steps, settings.eval_steps.start
    if steps < first:
        yield Finding("no-go", f"MAX_STEPS={steps}: the first evaluation is after step {first}; no run can succeed")
    if _rehearsal(settings):
        return
    if reference is None:
        largest = convergence.POINTS[-1].gbs
        yield Finding("warning", f"GBS {gbs}: the largest reference is {largest}; the checker fails a submission above it")
    elif first <= steps < (likely := (reference.mean + 2 * reference.deviation) / gbs):
        text = f"the reference takes {reference.mean / gbs:.0f} steps on average, some runs {likely:.0f}"
        yield Finding("warning", f"MAX_STEPS={steps}: {text}")
    if gbs < convergence.POINTS[0].gbs:
        yield Finding("warning", f"GBS {gbs}: below the smallest reference, {convergence.POINTS[0].gbs}, which counts instead")


def _memory(found: Memory) -> dict[str, Any]:
    return {
        "items": [{"name": item.name, "gb": item.bytes / GB, "source": item.source} for item in found.items],
        "total_gb": found.total / GB,
        "least_gb": found.least / GB,
        "capacity_gb": found.capacity / GB,
        "verdict": found.verdict,
    }


def _memory_findings(settings: Settings, part: Accelerator | None, found: Memory | None) -> Iterator[Finding]:
    if _rehearsal(settings):
        return
    if part is None or found is None:
        yield Finding("warning", "the GPU is not known: set ACCELERATOR, or name it in DGXSYSTEM, to forecast memory and time")
        return
    need = f"{found.total / GB:.1f} GB are needed, {part.name} has {found.capacity / GB:.1f}"
    if found.verdict == "tight":
        yield Finding("warning", f"memory is tight: {need}; the account is good to some percent")
    if found.verdict in ("over", "no"):
        fix = what_would_fit(settings, LLAMA2_70B, part) or "more TP, CP or PP"
        need += f"; {fix} would make room"
    if found.verdict == "over":
        least = f"submissions did with {found.least / GB:.0f}, by other software (memory.py: PUBLISHED)"
        yield Finding("warning", f"will likely run out of memory: {need}; {least}")
    if found.verdict == "no":
        yield Finding("no-go", f"does not fit: {need}")
    if settings.precision.fp4 and part.fp4_tflops is None:
        yield Finding("no-go", f"FP4=1: {part.name} has no FP4 units; set FP8=1 instead")


def _times(settings: Settings, part: Accelerator, steps: float) -> dict[str, Any]:
    gbs = settings.global_batch_size
    work = Work.from_settings(settings, part)
    evaluations = (steps - settings.eval_steps.start) / settings.eval_every_steps + 1
    intervals = forecast(work, steps * gbs, evaluations)
    run = intervals["run_minutes"]
    trials = settings.system.trials
    job = Interval(*(trials * (minutes + INIT_MINUTES) for minutes in (run.low, run.middle, run.high)))
    values: dict[str, Any] = {name: asdict(value) for name, value in (intervals | {"job_minutes": job}).items()}
    values |= {"samples_per_second": gbs / intervals["step_seconds"].middle, "evaluations": evaluations}
    return values | {"walltime_minutes": walltime_minutes(settings.system.walltime), "like_published": work.seen}


def _time_findings(settings: Settings, times: dict[str, Any] | None) -> Iterator[Finding]:
    if times is None:
        return
    limit, job, run = times["walltime_minutes"], times["job_minutes"], times["run_minutes"]
    if limit < run["low"] + INIT_MINUTES:
        yield Finding("no-go", f"WALLTIME={settings.system.walltime}: one run is expected to take {run['middle']:.0f} minutes")
    elif limit < job["high"]:
        text = f"{settings.system.trials} runs are expected to take {job['middle']:.0f} minutes, up to {job['high']:.0f}"
        yield Finding("warning", f"WALLTIME={settings.system.walltime}: {text}")


def misspelt(names: Iterable[str]) -> Iterator[Finding]:
    """Exported names that nothing reads but that look like a setting's."""
    known = variables()
    for name in sorted(set(names) - known):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            yield Finding("warning", f"{name}: nothing reads it; is {close[0]} meant?")
