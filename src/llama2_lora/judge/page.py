"""One HTML page that needs nothing but a browser: a table of all results, each result's charts, and below them the findings."""

from __future__ import annotations

from html import escape

from llama2_lora.findings import Finding
from llama2_lora.forecast.cost import Rates
from llama2_lora.judge.charts import extremes, loss_chart, power_chart, throughput_chart, time_chart
from llama2_lora.judge.published import envelope, label
from llama2_lora.judge.report import (
    COLUMN_NOTES,
    Group,
    config_line,
    cost_line,
    grouped,
    plural,
    score_line,
    table,
    verdict_line,
)
from llama2_lora.judge.results import Result, Summary

FOLDED = 3  # with more results than that, each one's table of runs is folded
NO_RATES = Rates()


def page(summary: Summary, peak_tflops: float | None = None, rates: Rates = NO_RATES) -> str:
    """The whole page: styles, charts and text are inside it."""
    results = by_score(summary.results)
    title = results[0].title if len(results) == 1 else f"llama2_70b_lora: {summary.folder.resolve().name}"
    found = grouped(summary)
    good = "good" if summary.ok else "bad"
    link = f' <a href="#findings">{len(found)} findings</a>' if found else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p id="verdict" class="{good}">{escape(verdict_line(summary))}</p>',
        f'<p class="small">{escape(str(summary.folder))}{link}</p>',
        _contents(results, found, peak_tflops) if len(results) > 1 else "",
        *(_section(i, result, peak_tflops, rates, len(results)) for i, result in enumerate(results)),
        f'<p class="small">{COLUMN_NOTES}</p>' if results else "",
        _findings(found),
    ]
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(part for part in body if part))


def by_score(results: list[Result]) -> list[Result]:
    """Best first; those without a score after the others, by their runs' mean time."""

    def key(result: Result) -> tuple[bool, float]:
        minutes = [run.train_minutes for run in result.runs if run.train_minutes is not None]
        mean = sum(minutes) / len(minutes) if minutes else float("inf")
        return result.score.minutes is None, mean if result.score.minutes is None else result.score.minutes

    return sorted(results, key=key)


# ---- The table of a whole round --------------------------------------------------------------------------------------

_HEADINGS = ("system", "submitter", "GPUs", "GBS", "score", "scaling", "RCP", "runs", "seq/s", "MFU", "findings")


def _contents(results: list[Result], found: list[Group], peak_tflops: float | None) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in _HEADINGS)
    rows = []
    for index, result in enumerate(results):
        count = sum(group.result is result for group in found)
        style = "" if result.ok else ' class="bad"'
        texts = [escape(text) for text in _contents_row(result, peak_tflops)]
        link = f'<a href="#r{index}">{escape(result.title)}</a>'
        rows.append(f"<tr{style}>" + "".join(f"<td>{text}</td>" for text in (link, *texts, str(count or "-"))) + "</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<nav id="contents"><div class="wide">{table}</div></nav>'


def _contents_row(result: Result, peak_tflops: float | None) -> list[str]:
    def mean(values: list[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return form.format(sum(known) / len(known)) if known else "-"

    score, system = result.score, result.runs[0].system
    rcp = {True: "passed", False: "FAILED", None: "-"}[score.rcp_passed]
    good = sum(run.complied and run.converged for run in result.runs)
    return [
        str(result.config.get("submission_org", "-")),
        f"{system.accelerators} {system.accelerator}" if system.accelerators else "-",
        f"{result.gbs or '-'}" + (f" {result.precision}" if result.precision else ""),
        "-" if score.minutes is None else f"{score.minutes:.3f}",
        "-" if score.scaling is None or score.minutes is None else f"{score.scaling:.4f}",
        rcp,
        f"{good}/{len(result.runs)}",
        mean([run.samples_per_second for run in result.runs], "{:.4g}"),
        mean([run.mfu(peak_tflops) for run in result.runs], "{:.1%}"),
    ]


# ---- One result ------------------------------------------------------------------------------------------------------


def _section(index: int, result: Result, peak_tflops: float | None, rates: Rates, count: int) -> str:
    published = [] if any(run.rehearsal for run in result.runs) else envelope(result.gbs, result.precision)
    over = f' over <span class="key eval">{escape(label(published))}</span> (median, 5% to 95%)' if published else ""
    legend = " ".join(f'<span class="key {kind}">{kind}</span>' for kind in ("init", "train", "eval"))
    marks = _marks(result)
    charts = {
        f"Evaluation loss{over}": loss_chart(result),
        f"Training throughput{marks}": throughput_chart(result),
        f"Time split {legend}": time_chart(result),
        "Power": power_chart(result),
    }
    drawn = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in charts.items() if svg)
    heading = f"<h2>{escape(result.title)}</h2>" if count > 1 else ""
    folder = f' <span class="small">{escape(result.name)}</span>' if result.name != result.title else ""
    cost = f'<p class="small">{escape(cost_line(result, rates))}</p>' if cost_line(result, rates) else ""
    runs = f'<div class="wide">{_table(result, peak_tflops)}</div>'
    if count > FOLDED:
        runs = f"<details><summary>{plural(len(result.runs), 'run')}</summary>{runs}</details>"
    top = ' <a class="small" href="#contents">contents</a>' if count > 1 else ""
    return (
        f'<section id="r{index}">{heading}<p>{escape(config_line(result))}{folder}</p>'
        f'<p class="score">{escape(score_line(result))}</p>{cost}<div class="charts">{drawn}</div>{runs}{top}</section>'
    )


def _marks(result: Result) -> str:
    """Which line is the best and which the worst run."""
    marked = extremes(result)
    runs = {marked[id(run)]: run for run in result.runs if id(run) in marked}
    texts = [
        f'<span class="mark {mark}">{mark}</span> {escape(runs[mark].path.name)}, {runs[mark].train_minutes:.2f} min'
        for mark in ("best", "worst")
        if mark in runs
    ]
    return ": " + "; ".join(texts) if texts else ""


def _table(result: Result, peak_tflops: float | None) -> str:
    headings, rows = table(result, peak_tflops)
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    marked = extremes(result)
    drawn = []
    for run, texts in zip(result.runs, rows, strict=True):
        styles = [*([] if run.complied and run.converged else ["bad"]), *([marked[id(run)]] if id(run) in marked else [])]
        style = f' class="{" ".join(styles)}"' if styles else ""
        drawn.append(f"<tr{style}>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>")
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{"".join(drawn)}</tbody></table>'


def _findings(found: list[Group]) -> str:
    items = "".join(_item(group.finding) for group in found)
    return f'<h2>Findings</h2><ul id="findings">{items}</ul>' if found else '<ul id="findings"></ul>'


def _item(finding: Finding) -> str:
    where = f" <code>{escape(finding.where)}</code>" if finding.where else ""
    return f'<li class="{finding.level}"><b>{finding.level}</b>{where} {escape(finding.text)}</li>'


_STYLE = """
:root { --ink: #1d2733; --soft: #5b6877; --paper: #fff; --line: #dde3ea; --run: #1f6fb4; --bad: #c0392b;
  --band: #e8b04a; --good: #1e7d46; --init: #a9b4c0; --eval: #e09f3e; --worst: #8e44ad; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa7b5; --paper: #14191f; --line: #2c353f;
  --run: #6db3f2; --bad: #ff7a6b; --good: #63c98a; --init: #66727f; --worst: #c79be0 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1320px;
  margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: .4rem 0; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin: 1.6rem 0 .3rem }
p { margin: .3rem 0 } a { color: var(--run) }
#verdict { font-weight: 600; padding: .4rem .8rem; border-left: 4px solid } .good { color: var(--good) }
.bad, .error b { color: var(--bad) } .score { font-weight: 600 } .small { color: var(--soft); font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 1rem; margin: .6rem 0 }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .9rem } svg.chart { width: 100%; height: auto }
svg text { font-size: 13px; fill: var(--soft) } svg .mid { text-anchor: middle } svg .end { text-anchor: end }
svg .small { font-size: 11px } svg polyline { fill: none } .grid { stroke: var(--line) } .hover { fill: transparent }
.run polyline { stroke: var(--run); stroke-width: 1.4; opacity: .6 } .run circle:not(.hover) { fill: var(--run) }
.run.best polyline { stroke: var(--good); stroke-width: 3; opacity: 1 } .run.best circle:not(.hover) { fill: var(--good) }
.run.worst polyline { stroke: var(--worst); stroke-width: 3; opacity: 1; stroke-dasharray: 7 3 }
.run.worst circle:not(.hover) { fill: var(--worst) }
.run.bad polyline { stroke: var(--bad) } .run.bad circle:not(.hover) { fill: var(--bad) }
.run:hover polyline { stroke-width: 4; opacity: 1 } .band { fill: var(--band); opacity: .25 }
.median polyline { stroke: var(--band); stroke-width: 2 } .median.rest polyline { stroke-dasharray: 2 4 }
.target polyline { stroke: var(--good); stroke-dasharray: 5 4 } svg .goal { fill: var(--good); font-weight: 600 }
.init { fill: var(--init); background: var(--init) } .train { fill: var(--run); background: var(--run) }
.eval { fill: var(--eval); background: var(--eval) }
.key, .mark { padding: 0 .4rem; border-radius: 3px; font-size: .8rem } .key { color: #111 }
.mark { color: var(--paper) } .mark.best { background: var(--good) } .mark.worst { background: var(--worst) }
svg text.best, tr.best td:first-child { fill: var(--good); color: var(--good); font-weight: 600 }
svg text.worst, tr.worst td:first-child { fill: var(--worst); color: var(--worst); font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, .runs th:nth-child(2), .runs td:nth-child(2) { text-align: left }
#contents { margin: .8rem 0 } #contents a { overflow-wrap: anywhere } #findings { padding-left: 1.1rem }
#findings li { margin: .25rem 0; overflow-wrap: anywhere } section { border-top: 1px solid var(--line); padding-top: .3rem }
@media (max-width: 500px) { body { padding: 0 .6rem; margin: .6rem auto } table { font-size: .85rem } }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --line: #ccc; --run: #1f6fb4; --bad: #c0392b; --good: #1e7d46;
  --init: #a9b4c0; --worst: #8e44ad } @page { size: landscape; margin: 10mm }
  body { max-width: none; margin: 0; font-size: 11px }
  .charts { grid-template-columns: repeat(3, 1fr); gap: .5rem } figure, tr, li, .charts { break-inside: avoid }
  h2 { break-after: avoid } section { break-inside: avoid-page } .wide { overflow: visible } table { font-size: 9px }
  th, td { padding: .1rem .3rem } * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
