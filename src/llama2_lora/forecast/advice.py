"""What is wrong with a config that is legal in itself, or should be looked at: rules, model, convergence, memory, time."""

from __future__ import annotations

from collections.abc import Iterator

from llama2_lora.config import rules, schedule
from llama2_lora.config.conflicts.closed import FIXED_IN_CLOSED
from llama2_lora.config.settings import FIELDS, Settings
from llama2_lora.config.shapes import shape_conflicts
from llama2_lora.findings import Finding
from llama2_lora.forecast import convergence
from llama2_lora.forecast.convergence import Convergence
from llama2_lora.forecast.memory import GB, Memory, what_would_fit
from llama2_lora.forecast.times import INIT_MINUTES, Times
from llama2_lora.gpus import Accelerator
from llama2_lora.llama2 import LLAMA2_70B

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


def advise(
    settings: Settings, reference: Convergence | None, part: Accelerator | None, memory: Memory | None, times: Times | None
) -> Iterator[Finding]:
    """Errors and warnings. A rehearsal's model is that of its checkpoint: preflight --inside and train.py look at it."""
    if settings.rehearsal:
        return
    yield from _shape_findings(settings)
    yield from _convergence_findings(settings, reference)
    yield from _memory_findings(settings, part, memory)
    yield from _time_findings(settings, times)
    yield from _submission_findings(settings)


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
    yield from (Finding("error", "model", problem) for problem in shape_conflicts(settings, LLAMA2_70B))


# ---- Convergence, memory, time ---------------------------------------------------------------------------------------


def _convergence_findings(settings: Settings, reference: Convergence | None) -> Iterator[Finding]:
    gbs, steps = settings.global_batch_size, settings.optimization.max_steps
    if reference is None:
        largest = convergence.POINTS[-1].gbs
        text = f"GBS {gbs}: the largest reference is {largest}; the checker fails a submission above it"
        yield Finding("warning", "convergence", text)
    elif steps < (likely := (reference.mean + 2 * reference.deviation) / gbs):
        text = f"the reference takes {reference.mean / gbs:.0f} steps on average, some runs {likely:.0f}"
        yield Finding("warning", "convergence", f"MAX_STEPS={steps}: {text}")
    if gbs < convergence.POINTS[0].gbs:
        text = f"GBS {gbs}: below the smallest reference, {convergence.POINTS[0].gbs}, which counts instead"
        yield Finding("warning", "convergence", text)


def _memory_findings(settings: Settings, part: Accelerator | None, found: Memory | None) -> Iterator[Finding]:
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
    if s.division != "closed" or settings.system.trials < rules.RUNS_PER_RESULT:
        return
    unset = [name for name in ("MLPERF_SUBMITTER", "MLPERF_SYSTEM_NAME") if settings.value(name) == FIELDS[name][1].default]
    if unset:
        text = f"{' and '.join(unset)}: not set: {settings.system.trials} runs of the closed division could not be submitted"
        yield Finding("warning", "submission", f"{text}; export it, or try with NEXP=1 first")
    elif s.status == "research":
        text = "results would be listed as Research, Development, or Internal; export onprem, cloud or preview unless they are"
        yield Finding("warning", "submission", f"MLPERF_STATUS=research: {text}")
