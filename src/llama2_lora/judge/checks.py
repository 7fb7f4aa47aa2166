"""What the official checkers do not look at: hyperparameters that the rules fix, the evaluation schedule, seeds, the clock.

Each check takes a run (or a result) and yields findings. Rule numbers: mlcommons/training_policies, training_rules.adoc.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama2_lora.config import rules, schedule
from llama2_lora.findings import Finding
from llama2_lora.judge import observed
from llama2_lora.judge.official import compliance_messages, official_score
from llama2_lora.judge.published import EnvelopeRow, envelope, label
from llama2_lora.judge.results import NAMES, PLACEHOLDER, Result, Summary, group, read_runs, repeats
from llama2_lora.judge.run import USUAL_TRAIN_LOSS, Run
from llama2_lora.judge.runlog import Event, number, samples_count
from llama2_lora.judge.systems import round_of

RULESETS = ("4.0.0", "4.1.0", *rules.RULESETS)  # those of mlperf_logging that know this benchmark

FIXED = {  # key -> (value, section)
    "lora_rank": (rules.LORA_RANK, "§9.1"),
    "lora_alpha": (rules.LORA_ALPHA, "§9.1"),
    "opt_gradient_clip_norm": (rules.GRADIENT_CLIP_NORM, "§9.1"),
    "opt_adamw_weight_decay": (rules.WEIGHT_DECAY, "§9.1"),
    "target_accuracy": (rules.TARGET_LOSS, "§4.1"),
    "train_samples": (rules.TRAIN_SEQUENCES, "§4.1"),
    "eval_samples": (rules.EVAL_SEQUENCES, "§9.4"),
}
DATA_EVENTS = ("block_start", "epoch_start", "eval_start", "eval_accuracy")
DIVISION = "submission_division"
DATA_SIZES = ("train_samples", "eval_samples")
MOST_MFU = 1.5  # 8xGB300 reached 1.31 of its bf16 peak in FP4 and FP8 (v5.1): more is a mistake in a count or in the parts
EARLY_ROUNDS = ("v4.0", "v4.1")  # their rules are in mlperf_logging, but not those that later rounds are judged by
TOLERANCE = 1e-6


def judge(folder: Path, ruleset: str) -> Summary:
    """Read, check and score everything under a folder (or one file)."""
    runs, found = read_runs(folder)
    for run in runs:
        check_run(run, ruleset)
    results = group(runs, folder)
    for result in results:
        result.findings.extend([*_seeds(result), *_names(result)])
        result.score = official_score(result.runs, result.config.get(DIVISION), ruleset)
    for result, finding in repeats(results):
        result.findings.append(finding)
    return Summary(folder, ruleset, results, [*found, *_folders(results)])


def _folders(results: list[Result]) -> Iterator[Finding]:
    """Folders that hold more than one result."""
    places: dict[Path, list[Result]] = {}
    for result in results:
        for folder in {run.path.parent for run in result.runs}:
            places.setdefault(folder, []).append(result)
    for folder, here in places.items():
        others = [result for result in here if not all(here[0].fits(run) for run in result.runs)]
        if others:
            yield Finding("warning", "mixed configs", f"{len(others) + 1} configs in one folder", str(folder))
        elif len(here) > 1:
            yield Finding("note", "several jobs", f"{len(here)} jobs in one folder, told apart by DATESTAMP", str(folder))


def check_run(run: Run, ruleset: str) -> None:
    """Fill in a run's compliance and findings."""
    run.compliance = compliance_messages(run.log, ruleset)
    where = str(run.path)
    for found in (*(check(run) for check in RUN_CHECKS), _round(run, ruleset)):
        for finding in found:
            excused = "a rehearsal" if run.rehearsal else "the open division" if run.values.get(DIVISION) == "open" else ""
            if excused and finding.code in ("fixed value", "evaluation schedule"):
                finding = replace(finding, level="note", text=f"{finding.text} ({excused} may)")
            run.findings.append(replace(finding, where=where + finding.where))


def _damage(run: Run) -> Iterator[Finding]:
    for damage in run.log.damaged:
        yield Finding("warning", "damaged line", f"{damage.error}: {damage.text}", f":{damage.line}")
    if spaced := run.log.spaced:
        text = f"{spaced.total()} keys with a space at the end, such as {next(iter(spaced))!r}; read without it"
        yield Finding("warning", "key with space", text, f":{run.log.first_spaced_line}")


def _times(run: Run) -> Iterator[Finding]:
    if back := run.log.backward:
        text = f"{run.log.backward_count} lines are earlier than the line before them, the first is {back[0].key}"
        yield Finding("warning", "out of order", text, f":{back[0].line}")
    if (starts := len(list(run.events("run_start")))) > 1:
        yield Finding("error", "several runs", f"{starts} runs in one file; the figures are the first one's")


def _convergence(run: Run) -> Iterator[Finding]:
    for event in run.events("eval_accuracy"):
        if number(event.value) is None:
            yield Finding("error", "no loss", f"eval_accuracy is {event.value}, not a loss", f":{event.line}")
    reached, reported = run.sequences_to_converge, run.reported_status
    last = f"last evaluation loss {run.evaluations[-1][1]:.4f}" if run.evaluations else "no evaluation"
    if run.status == "unfinished":
        yield Finding("error", "no run_stop", f"the log ends without run_stop: killed, crashed or still running; {last}")
    elif not run.converged:
        yield Finding("error", "not converged", f"{run.status}: {last}, target {rules.TARGET_LOSS} (§4.1)")
    if reported == "success" and reached is None:
        text = f"run_stop says success, but no evaluation is at or below {rules.TARGET_LOSS}: {last}"
        yield Finding("error", "false status", text)
    if reached is not None and run.evaluations[-1][0] > reached:
        yield Finding("warning", "ran on", f"went on training after it reached the target at {reached} sequences")


def _fixed_values(run: Run) -> Iterator[Finding]:
    for key, (expected, section) in FIXED.items():
        value = run.values.get(key, expected)  # a key that the rules ask for is missed by the official checker
        if run.rehearsal and key in DATA_SIZES:
            continue
        if not isinstance(value, (int, float)) or abs(value - expected) > TOLERANCE * expected:
            yield Finding("error", "fixed value", f"{key} is {value}; the rules fix {expected} ({section})")


def _evaluation_schedule(run: Run) -> Iterator[Finding]:
    gbs, seen = run.gbs, [samples_count(e) for e in run.events("eval_accuracy")]
    if gbs is None:
        return
    first, every = schedule.first_eval_step(gbs) * gbs, schedule.eval_every_steps(gbs) * gbs
    for index, sequences in enumerate(seen):
        if sequences != first + index * every:
            text = f"evaluation {index + 1} came after {sequences} sequences, by the rule after {first + index * every}"
            rule = f"first {first}, then every {every} with GBS {gbs} (§9.4)"
            yield Finding("error", "evaluation schedule", f"{text}: {rule}")
            return


def _data_before_clock(run: Run) -> Iterator[Finding]:
    start = run.first("run_start")
    if start is None:
        return
    events: list[Event] = [e for e in run.log.events if e.key in DATA_EVENTS]
    events += [run.log.train_losses.first] if run.log.train_losses.first else []
    early = [e for e in events if e.line < start.line or (e.time_ms < start.time_ms and samples_count(e))]
    if early:
        text = f"{early[0].key} before run_start: data must be untouched until the clock runs (§11)"
        yield Finding("error", "data before run_start", text, f":{early[0].line}")


def _submission(run: Run) -> Iterator[Finding]:
    if run.rehearsal:
        kind = str(run.values["submission_platform"]).partition(",")[0]  # CPU rehearsal, GPU rehearsal
        text = f"{kind} with a small model and generated data: not a submission, no MFU, no score"
        yield Finding("note", "rehearsal", text)
        return
    for key in ("submission_platform", "submission_org"):
        if PLACEHOLDER.search(str(run.values.get(key, ""))):
            yield Finding("warning", "placeholder", f"{key} is {run.values.get(key, '')!r}: name the real one")
    if any(e.value is False for e in run.events("cache_clear")):
        yield Finding("warning", "warm caches", "cache_clear is false: caches must be dropped before a run (§6.1)")


def _train_loss(run: Run) -> Iterator[Finding]:
    factor = run.train_loss_factor
    if factor is None or factor == 1:
        return
    cp = run.values.get("context_parallelism")
    known = f"context_parallelism is {cp}" if cp else "context parallelism is not logged"
    times = f"{factor:g} times" if factor > 1 else f"1/{1 / factor:g} of"
    why = "summed over" if factor > 1 else "divided by the number of"
    text = f"train_loss is about {times} the usual {USUAL_TRAIN_LOSS}: {why} context ranks? {known}"
    yield Finding("warning", "inflated train loss" if factor > 1 else "deflated train loss", text)


def _utilization(run: Run) -> Iterator[Finding]:
    if (mfu := run.mfu()) is not None and mfu > MOST_MFU:
        s = run.system
        text = f"MFU {mfu:.0%} of the bf16 peak of {s.accelerators} {s.accelerator}: samples_count or the parts are wrong"
        yield Finding("warning", "impossible MFU", f"{text}; no published run passed {MOST_MFU:.0%}")


def _observed(run: Run) -> Iterator[Finding]:
    """What OBSERVE_* left beside the log."""
    if times := observed.read(observed.folder_of(run.path.parent, run.seed)):
        yield Finding("note", "step times", str(times))
    if run.power and run.power.gpus_alone:
        text = "power is that of the GPUs alone (nvidia-smi), not at the wall: no figure for a submission"
        yield Finding("note", "power log", text)


def _round(run: Run, ruleset: str) -> Iterator[Finding]:
    made_for = round_of(run)
    if made_for in EARLY_ROUNDS and not ruleset.startswith(made_for[1:]):
        text = f"by its date a log of {made_for}, whose rules are not those it is judged by here ({ruleset})"
        yield Finding("note", "other round", f"{text}: what is broken need not have been broken then")


def _published(run: Run) -> Iterator[Finding]:
    rows = {row.sequences: row for row in envelope(run.gbs, run.precision) if row.whole}
    compared = [(rows[s], loss) for s, loss in run.evaluations if s in rows]
    outside = [(row, loss) for row, loss in compared if loss > row.p95]
    if run.rehearsal or 2 * len(outside) <= len(compared):  # one in twenty of the published evaluations is outside
        return
    row, loss = outside[-1]
    yield Finding("warning", "slow convergence", f"{len(outside)} of {len(compared)} {_beyond(row, loss)}")


def _beyond(row: EnvelopeRow, loss: float) -> str:
    where = f"at {row.sequences} sequences {loss:.4f}, published 95% quantile {row.p95:.4f}, median {row.median:.4f}"
    return f"evaluations are worse than 95% of the {label([row])}: {where}"


RUN_CHECKS = (
    *(_damage, _times, _convergence, _fixed_values, _evaluation_schedule, _data_before_clock),
    *(_submission, _train_loss, _utilization, _published, _observed),
)


def _seeds(result: Result) -> Iterator[Finding]:
    seen: dict[str, Run] = {}
    for run in result.runs:
        if run.seed is None:
            yield Finding("error", "no seed", "no seed is logged (§5.1)", str(run.path))
        elif (other := seen.setdefault(str(run.seed), run)) is not run:
            text = f"seed {run.seed} is also {other.path.name}'s: no two runs may share a seed (§5.1)"
            yield Finding("error", "duplicate seed", text, str(run.path))


def _names(result: Result) -> Iterator[Finding]:
    """Names decide nothing, but a result has one submitter, one system and one config file."""
    for key in NAMES:
        if len(values := result.names(key)) > 1:
            listed = ", ".join(f"{name!r} in {len(runs)} ({runs[0].path.name})" for name, runs in values.items())
            yield Finding("warning", "names differ", f"{key} is {listed}", str(result.runs[0].path.parent))
