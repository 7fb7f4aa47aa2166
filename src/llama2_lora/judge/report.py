"""A summary in words: the cells of the table, and one HTML page that needs nothing but a browser."""

from __future__ import annotations

from html import escape
from typing import Any

from llama2_lora.config import schedule
from llama2_lora.judge.charts import loss_chart, throughput_chart, time_chart
from llama2_lora.judge.published import envelope
from llama2_lora.judge.results import Result, Summary
from llama2_lora.judge.run import Finding, Run, figures

COLUMNS = {  # heading -> figure, format
    "run": ("run", "{}"),
    "status": ("status", "{}"),
    "minutes": ("train_minutes", "{:.2f}"),
    "evals": ("evaluations", "{}"),
    "loss": ("final_loss", "{:.4f}"),
    "sequences": ("sequences_to_converge", "{:,}"),
    "seq/s": ("samples_per_second", "{:.2f}"),
    "s/step": ("step_seconds", "{:.3f}"),
    "MFU": ("mfu", "{:.1%}"),
    "eval": ("eval_share", "{:.1%}"),
    "init min": ("init_minutes", "{:.1f}"),
    "seed": ("seed", "{}"),
    "rules": ("complied", "{}"),
    "vs published": ("loss_minus_published_median", "{:+.4f}"),
}
COLUMN_NOTES = (
    "minutes: run_start to run_stop, what is scored. seq/s, s/step and MFU: training without evaluation. eval: its share "
    "of the minutes. vs published: mean difference of the evaluation losses to the published median, nats."
)
CONFIG_LABELS = {
    "submission_platform": "",
    "global_batch_size": "GBS ",
    "gradient_accumulation_steps": "accumulation ",
    "opt_base_learning_rate": "LR ",
    "opt_learning_rate_training_steps": "steps ",
}


def cells(row: dict[str, Any]) -> list[str]:
    """A run's figures as text; a dash where the log does not tell."""
    row = row | {"complied": "complied" if row["complied"] else "BROKEN"}
    return ["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.values()]


def config_line(result: Result) -> str:
    config = result.config
    return ", ".join(f"{label}{config[key]}" for key, label in CONFIG_LABELS.items() if key in config)


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


def verdict_line(summary: Summary) -> str:
    count = len(summary.runs)
    said = "all runs complied and converged" if summary.ok else "NOT all runs complied and converged"
    return f"{count} run{'s' * (count != 1)}, rules {summary.ruleset}: {said if count else 'nothing to judge'}"


def compliance_findings(summary: Summary, most: int | None = None) -> list[Finding]:
    """The official checker's objections as findings, the first line of each; at most `most` per run."""
    found = []
    for run in summary.runs:
        for message in run.compliance[:most]:
            text = "compliance checker: " + message.splitlines()[0]
            found.append(Finding("error", "compliance", text, str(run.path)))
        if most is not None and len(run.compliance) > most:
            text = f"compliance checker: {len(run.compliance) - most} more (--json has them all)"
            found.append(Finding("error", "compliance", text, str(run.path)))
    return found


def page(summary: Summary, peak_tflops: float | None = None) -> str:
    """The whole page: styles, charts and text are inside it."""
    findings = compliance_findings(summary) + summary.all_findings()
    good = "good" if summary.ok else "bad"
    body = [
        f"<h1>llama2_70b_lora: {escape(str(summary.folder))}</h1>",
        f'<p id="verdict" class="{good}">{escape(verdict_line(summary))}</p>',
        '<ul id="findings">' + "".join(map(_item, findings)) + "</ul>",
        *(_section(result, peak_tflops) for result in summary.results),
    ]
    return _PAGE.format(style=_STYLE, body="\n".join(body))


def _item(finding: Finding) -> str:
    where = f" <code>{escape(finding.where)}</code>" if finding.where else ""
    return f'<li class="{finding.level}"><b>{finding.level}</b>{where} {escape(finding.text)}</li>'


def _section(result: Result, peak_tflops: float | None) -> str:
    gbs = result.config.get("global_batch_size")
    over = f' over <span class="key eval">published 70B runs, GBS {gbs}</span> (median, 5% to 95%)' if envelope(gbs) else ""
    legend = " ".join(f'<span class="key {kind}">{kind}</span>' for kind in ("init", "train", "eval"))
    charts = {
        f"Evaluation loss{over}": loss_chart(result),
        "Training throughput": throughput_chart(result),
        f"Time split {legend}": time_chart(result),
    }
    drawn = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in charts.items() if svg)
    return (
        f"<section><h2>{escape(result.name)}</h2><p>{escape(config_line(result))}</p>"
        f'<p class="score">{escape(score_line(result))}</p><div class="charts">{drawn}</div>'
        f'<div class="wide">{_table(result, peak_tflops)}</div><p class="small">{COLUMN_NOTES}</p></section>'
    )


def _table(result: Result, peak_tflops: float | None) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = []
    for run in result.runs:
        style = "" if run.complied and run.converged else ' class="bad"'
        texts = cells(figures(run, peak_tflops))
        rows.append(f"<tr{style}>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


_STYLE = """
:root { --ink: #1d2733; --soft: #5b6877; --paper: #fff; --line: #dde3ea; --run: #1f6fb4; --bad: #c0392b;
  --band: #e8b04a; --good: #1e7d46; --init: #a9b4c0; --eval: #e09f3e; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa7b5; --paper: #14191f; --line: #2c353f;
  --run: #6db3f2; --bad: #ff7a6b; --good: #63c98a; --init: #66727f } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1240px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.35rem } h2 { font-size: 1.1rem; margin-top: 2rem }
#verdict { font-weight: 600; padding: .5rem .8rem; border-left: 4px solid } .good { color: var(--good) }
.bad, .error b { color: var(--bad) } .score { font-weight: 600 } .small { color: var(--soft); font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { color: var(--soft) } svg.chart { width: 100%; height: auto }
svg text { font-size: 12px; fill: var(--soft) } svg .mid { text-anchor: middle } svg .end { text-anchor: end }
svg .small { font-size: 11px } svg polyline { fill: none } .grid { stroke: var(--line) }
.run polyline { stroke: var(--run); stroke-width: 1.6; opacity: .75 } .run circle { fill: var(--run) }
.run.bad polyline { stroke: var(--bad) } .run.bad circle { fill: var(--bad) }
.run:hover polyline { stroke-width: 4; opacity: 1 } .band { fill: var(--band); opacity: .25 }
.median polyline { stroke: var(--band); stroke-width: 2 } .target polyline { stroke: var(--good); stroke-dasharray: 5 4 }
.init { fill: var(--init); background: var(--init) } .train { fill: var(--run); background: var(--run) }
.eval { fill: var(--eval); background: var(--eval) }
.key { color: #111; padding: 0 .4rem; border-radius: 3px; font-size: .8rem }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
#findings { padding-left: 1.1rem } #findings li { margin: .25rem 0; overflow-wrap: anywhere }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llama2_70b_lora runs</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
