"""A summary in words: the cells of the table, the lines around it, and findings by system and kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from llama2_lora.config import schedule
from llama2_lora.findings import LEVELS, Finding
from llama2_lora.forecast.cost import Cost, Rates, cost
from llama2_lora.judge.results import Result, Summary, total
from llama2_lora.judge.run import Run, figures

COLUMNS = {  # heading -> figure, format
    "run": ("run", "{}"),
    "status": ("status", "{}"),
    "minutes": ("train_minutes", "{:.2f}"),
    "evals": ("evaluations", "{}"),
    "loss": ("final_loss", "{:.4f}"),
    "sequences": ("sequences_to_converge", "{:,}"),
    "seq/s": ("samples_per_second", "{:.4g}"),
    "s/step": ("step_seconds", "{:.4g}"),
    "MFU": ("mfu", "{:.1%}"),
    "eval": ("eval_share", "{:.1%}"),
    "init min": ("init_minutes", "{:.1f}"),
    "kW": ("mean_kilowatts", "{:.3g}"),
    "kWh": ("energy_kwh", "{:.3g}"),
    "seed": ("seed", "{}"),
    "rules": ("complied", "{}"),
    "vs published": ("loss_minus_published_median", "{:+.4f}"),
}
COLUMN_NOTES = (
    "minutes: run_start to run_stop, what is scored. seq/s, s/step and MFU: training without evaluation; MFU against the bf16 "
    "peak. eval: its share of the minutes. kW, kWh: mean power of all nodes, and energy to target. vs published: mean "
    "difference of the evaluation losses to the published median, nats, while at least 95% of those runs were still running."
)
CONFIG_LABELS = {
    "submission_platform": "",
    "global_batch_size": "GBS ",
    "gradient_accumulation_steps": "accumulation ",
    "opt_base_learning_rate": "LR ",
    "opt_learning_rate_training_steps": "steps ",
}
NO_RATES = Rates()
NUMBER = re.compile(r"\d[\d.,e+-]*")


def cells(row: dict[str, Any]) -> list[str]:
    """A run's figures as text; a dash where the log does not tell."""
    row = row | {"complied": "complied" if row["complied"] else "BROKEN"}
    return ["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.values()]


def table(result: Result, peak_tflops: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Headings and a row per run, without the columns that no run fills."""
    rows = [cells(figures(run, peak_tflops)) for run in result.runs]
    kept = [i for i, _ in enumerate(COLUMNS) if any(row[i] != "-" for row in rows)]
    return [list(COLUMNS)[i] for i in kept], [[row[i] for i in kept] for row in rows]


def config_line(result: Result) -> str:
    config = result.config
    parts = [f"{label}{config[key]}" for key, label in CONFIG_LABELS.items() if key in config]
    run = result.runs[0]
    parts += [result.precision] if result.precision else []
    parts += [" ".join(f"{name}{size}" for name, size in run.parallelism.items())] if run.parallelism else []
    return ", ".join(parts)


def score_line(result: Result) -> str:
    score = result.score
    if score.minutes is None:
        return score.reason + (f" (RCP: {score.rcp})" if score.rcp else "")
    passed = {True: "passed", False: "FAILED", None: ""}[score.rcp_passed]
    parts = [f"olympic mean {score.olympic_minutes:.3f} min x scaling {score.scaling:.4f}", f"RCP {passed}: {score.rcp}"]
    if score.sequences and score.reference_sequences:
        limits = f"reference {score.reference_sequences:,.0f}, bound {score.bound_sequences:,.0f}"
        parts.append(f"{score.sequences:,.0f} sequences on average, {limits}")
    return f"score: {score.minutes:.3f} minutes ({'; '.join(parts)})"


def result_cost(result: Result, rates: Rates) -> Cost | None:
    """Of all runs; None where the number of GPUs is not known. An energy counts where each run's power was measured."""
    hours = total(run.gpu_hours for run in result.runs)
    measured = [run.energy_kwh for run in result.runs]
    return None if hours is None else cost(hours, rates, None if None in measured else total(measured))


def cost_line(result: Result, rates: Rates) -> str:
    """Empty where nothing is known."""
    found = result_cost(result, rates)
    if found is None:
        return ""
    power = [run.power.mean_watts for run in result.runs if run.power]
    drawn = f"; {sum(power) / len(power) / 1e3:.3g} kW on average (measured)" if power else ""
    return f"cost: {found} for {plural(len(result.runs), 'run')} with init{drawn}"


def progress_line(run: Run) -> str:
    """Where a run that has not ended stands, and when its next evaluation is due."""
    progress = run.progress()
    if run.first("run_stop"):
        return f"{run.path.name}: {run.status}"
    if progress is None:
        return f"{run.path.name}: {run.status}, no training step yet"
    sequences, seconds, pace = progress
    parts = [f"{run.path.name}: {sequences:,} sequences in {seconds / 60:.1f} min"]
    parts += [f"{pace:.2f} sequences/s"] if pace else []
    parts += [f"train loss {run.train_losses[-1][1]:.4f}"]
    parts += [f"evaluation {run.evaluations[-1][1]:.4f} at {run.evaluations[-1][0]:,}"] if run.evaluations else []
    if run.gbs:
        first, every = (steps * run.gbs for steps in (schedule.first_eval_step(run.gbs), schedule.eval_every_steps(run.gbs)))
        due = first + max(0, (sequences - first) // every + 1) * every
        parts.append(f"next at {due:,}" + (f" in {(due - sequences) / pace / 60:.1f} min" if pace else ""))
    return ", ".join(parts)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def verdict_line(summary: Summary) -> str:
    count = len(summary.runs)
    said = "all runs complied and converged" if summary.ok else "NOT all runs complied and converged"
    return f"{plural(count, 'run')}, rules {summary.ruleset}: {said if count else 'nothing to judge'}"


# ---- JSON ------------------------------------------------------------------------------------------------------------


def as_dict(summary: Summary, peak_tflops: float | None = None, rates: Rates = NO_RATES) -> dict[str, Any]:
    """Everything, ready for JSON: all findings, and the groups of them that the terminal shows."""
    whole = {
        "folder": str(summary.folder),
        "ruleset": summary.ruleset,
        "ok": summary.ok,
        "results": [_result_dict(result, peak_tflops, rates) for result in summary.results],
        "findings": [vars(f) for f in summary.all_findings()],
        "finding_groups": [
            vars(group.finding) | {"result": group.result and group.result.name, "runs": group.runs}
            for group in grouped(summary)
        ],
    }
    return _strict(whole)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; a log's values may."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _result_dict(result: Result, peak_tflops: float | None, rates: Rates) -> dict[str, Any]:
    runs = [
        {
            **figures(run, peak_tflops),
            "losses": run.evaluations,
            "compliance_messages": run.compliance,
            "file": str(run.path),
        }
        for run in result.runs
    ]
    found = result_cost(result, rates)
    return {
        "name": result.name,
        "system": result.title,
        "ok": result.ok,
        "config": result.config,
        "score": vars(result.score),
        "cost": None if found is None else asdict(found),
        "runs": runs,
    }


# ---- Findings by system and kind -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Findings of one kind in one result: the first of them, and in how many of its runs."""

    first: Finding
    result: Result | None
    runs: int

    @property
    def finding(self) -> Finding:
        """The first one, as said of the whole group."""
        f = self.first
        if self.result is None or self.runs < 2:
            return f
        text = f"{self.runs} of {len(self.result.runs)} runs: {f.text} (first: {f.where})"
        return Finding(f.level, f.code, text, self.result.name)


def grouped(summary: Summary) -> list[Group]:
    """Errors first; within a level by result."""
    found = [Group(finding, None, 0) for finding in summary.findings]
    for result in summary.results:
        found += _groups(result, [(finding, None) for finding in result.findings])
        each = [(finding, run) for run in result.runs for finding in (*_objections(run), *run.findings)]
        found += _groups(result, each)
    return sorted(found, key=lambda group: LEVELS.index(group.first.level))


def _groups(result: Result, findings: Iterable[tuple[Finding, Run | None]]) -> list[Group]:
    kinds: dict[tuple[str, str, str], list[tuple[Finding, Run | None]]] = {}
    for finding, run in findings:
        kind = "" if finding.code == "damaged line" else NUMBER.sub("#", finding.text)
        kinds.setdefault((finding.level, finding.code, kind), []).append((finding, run))
    return [Group(same[0][0], result, len({id(run) for _, run in same} if same[0][1] else same)) for same in kinds.values()]


def _objections(run: Run) -> list[Finding]:
    """The official checker's, the first line of each."""
    lines = [f"compliance checker: {message.splitlines()[0]}" for message in run.compliance]
    return [Finding("error", "compliance", text, str(run.path)) for text in lines]
