"""Three charts of a result as inline SVG: loss over the published envelope, throughput over time, where the time went.

Colours are CSS classes of page.py, so that its light and dark scheme and paper hold. Hovering a point gives its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from llama2_lora.config import rules
from llama2_lora.judge.published import EnvelopeRow, envelope, label
from llama2_lora.judge.results import Result
from llama2_lora.judge.run import Run

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 46, 14, 44
BAR_PIXELS = 18  # per run in the time chart
MOST_NAMED_BARS = 40
Point = tuple[float, float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


class Axes:
    """Data coordinates -> pixels, and what every chart draws."""

    def __init__(self, x: Point, y: Point, labels: tuple[str, str], height: int = HEIGHT) -> None:
        self.x, self.y, self.labels, self.height = x, y, labels, height
        self.parts: list[str] = []

    def at(self, point: Point) -> str:
        x = LEFT + (point[0] - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)
        y = self.height - BOTTOM - (point[1] - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    def line(self, points: Sequence[Point], style: str, title: str = "") -> None:
        path = " ".join(map(self.at, points))
        self.parts.append(f'<g class="{style}">{_title(title)}<polyline points="{path}"/></g>')

    def run(self, pieces: Sequence[Sequence[Point]], style: str, title: str, dots: Sequence[tuple[Point, str]]) -> None:
        """A run's line in one or more pieces, and its points, each with its own words when hovered."""
        lines = "".join(f'<polyline points="{" ".join(map(self.at, piece))}"/>' for piece in pieces)
        marks = "".join(self._dot(point, words) for point, words in dots)
        self.parts.append(f'<g class="{style}">{_title(title)}{lines}{marks}</g>')

    def area(self, points: Sequence[Point], style: str, title: str) -> None:
        path = " ".join(map(self.at, points))
        self.parts.append(f'<polygon class="{style}" points="{path}">{_title(title)}</polygon>')

    def text(self, point: Point, words: str, style: str = "", shift: tuple[float, float] = (0, 0)) -> None:
        x, y = self.at(point).split(",")
        self.parts.append(
            f'<text class="{style}" x="{float(x) + shift[0]:.1f}" y="{float(y) + shift[1]:.1f}">{escape(words)}</text>'
        )

    def svg(self, name: str, y_format: Callable[[float], str] | None) -> str:
        """The finished chart; `y_format` None leaves out the y axis' marks."""
        grid = [self._x_mark(v) for v in ticks(*self.x)]
        grid += [self._y_mark(v, y_format(v)) for v in ticks(*self.y)] if y_format else []
        middle = (TOP + self.height - BOTTOM) / 2
        names = f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{self.height - 6}">{self.labels[0]}</text>' + (
            f'<text class="mid" transform="translate(13 {middle}) rotate(-90)">{self.labels[1]}</text>'
            if self.labels[1]
            else ""
        )
        size = f'viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(name)}"'
        return f'<svg class="chart" {size}>{"".join(grid)}{"".join(self.parts)}{names}</svg>'

    def _dot(self, point: Point, words: str) -> str:
        x, y = self.at(point).split(",")
        target = f'<circle class="hover" cx="{x}" cy="{y}" r="7"/>'  # a finger is wider than a point
        return f'<g>{_title(words)}<circle cx="{x}" cy="{y}" r="2.5"/>{target}</g>'

    def _x_mark(self, value: float) -> str:
        x = self.at((value, self.y[0])).split(",")[0]
        bottom = self.height - BOTTOM
        line = f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'
        return f'{line}<text class="mid" x="{x}" y="{bottom + 16}">{value:,g}</text>'

    def _y_mark(self, value: float, words: str) -> str:
        y = float(self.at((self.x[0], value)).split(",")[1])
        line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        return f'{line}<text class="end" x="{LEFT - 6}" y="{y + 4}">{words}</text>'


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def extremes(result: Result) -> dict[int, str]:
    """The fastest and the slowest of the runs that converged, by id: best and worst."""
    converged = sorted((run for run in result.runs if run.converged), key=lambda run: run.train_minutes or 0.0)
    return {id(converged[-1]): "worst", id(converged[0]): "best"} if len(converged) > 1 else {}


def _style(run: Run, marked: dict[int, str]) -> str:
    return " ".join(["run", *([] if run.converged else ["bad"]), *([marked[id(run)]] if id(run) in marked else [])])


def _name(run: Run, marked: dict[int, str]) -> str:
    return run.path.name + (f" ({marked[id(run)]})" if id(run) in marked else "")


def _on_top(runs: Iterable[Run], marked: dict[int, str]) -> list[Run]:
    """The marked runs are drawn last."""
    return sorted(runs, key=lambda run: id(run) in marked)


def _range(values: Iterable[float], margin: float = 0.04) -> Point:
    values = list(values)
    low, high = min(values), max(values)
    space = (high - low or abs(high) or 1.0) * margin
    return low - space, high + space


def loss_chart(result: Result) -> str:
    """Evaluation loss against training sequences, over what was published for this GBS and precision."""
    points = [point for run in result.runs for point in run.evaluations]
    if not points:
        return ""
    published = [] if any(run.rehearsal for run in result.runs) else envelope(result.gbs, result.precision)
    usual = next((row.sequences for row in published if row.share_converged >= 0.5), 0)
    end = max(usual, *(s * 1.1 for s, _ in points))
    published = [row for row in published if row.sequences <= end]
    losses = [loss for _, loss in points] + [rules.TARGET_LOSS]
    losses += [v for row in published for v in (row.p05, row.p95)]
    sequences = [s for s, _ in points] + [row.sequences for row in published]
    axes = Axes(_range(sequences), _range(losses), ("training sequences", "evaluation loss (nats)"))
    if published:
        _draw_envelope(axes, published)
    axes.line([(axes.x[0], rules.TARGET_LOSS), (axes.x[1], rules.TARGET_LOSS)], "target", f"target {rules.TARGET_LOSS}")
    axes.text((axes.x[1], rules.TARGET_LOSS), f"{rules.TARGET_LOSS}", "goal", (4, 4))  # in the margin, where no curve is
    marked = extremes(result)
    for run in _on_top(result.runs, marked):
        if run.evaluations:
            name = f"{_name(run, marked)}, seed {run.seed}"
            dots = [((s, loss), f"{name}: {loss:.4f} at {s:,} sequences") for s, loss in run.evaluations]
            axes.run([list(run.evaluations)], _style(run, marked), name, dots)
    return axes.svg("evaluation loss against training sequences", lambda v: f"{v:.3g}")


def _draw_envelope(axes: Axes, rows: list[EnvelopeRow]) -> None:
    """Band and median; dashed and without a band where runs have stopped, or kept another schedule."""
    whole = [row for row in rows if row.whole]
    words = label(rows)
    if len(whole) > 1:
        low = [(row.sequences, row.p05) for row in whole]
        high = [(row.sequences, row.p95) for row in reversed(whole)]
        axes.area(low + high, "band", f"{words}: 5% to 95%")
        axes.line([(row.sequences, row.median) for row in whole], "median", f"median of {words}")
    rest = rows[max(0, len(whole) - 1) :]
    if len(rest) > 1:
        why = f"of those still running: {rest[-1].running} of {rest[-1].runs} at {rest[-1].sequences:,}"
        axes.line([(row.sequences, row.median) for row in rest], "median rest", f"median of {words}, {why}")


def throughput_chart(result: Result) -> str:
    """Training sequences per second of each block between evaluations, against minutes since run_start."""
    runs = [run for run in result.runs if run.blocks]
    if not runs:
        return ""
    speeds = [block.sequences / block.seconds for run in runs for block in run.blocks]
    end = max(block.end for run in runs for block in run.blocks) / 60
    axes = Axes((0, end or 1), _range(speeds, 0.08), ("minutes since run_start", "training sequences/s"))
    marked = extremes(result)
    for run in _on_top(runs, marked):
        pieces, dots = [], []
        for block in run.blocks:
            speed, start, stop = block.sequences / block.seconds, (block.end - block.seconds) / 60, block.end / 60
            pieces.append([(start, speed), (stop, speed)])
            dots.append((((start + stop) / 2, speed), f"{_name(run, marked)}: {speed:.4g} sequences/s until {stop:.2f} min"))
        axes.run(pieces, _style(run, marked), f"{_name(run, marked)}: {run.samples_per_second:.4g} sequences/s", dots)
    return axes.svg("throughput over time", lambda v: f"{v:.4g}")


def power_chart(result: Result) -> str:
    """Kilowatts of all nodes against minutes since run_start, where power was measured."""
    curves = []
    for run in result.runs:
        start = run.first("run_start")
        if run.power and len(run.power.curve) > 1 and start:
            curves.append((run, [((ms - start.time_ms) / 60e3, watts / 1e3) for ms, watts in run.power.curve]))
    if not curves:
        return ""
    points = [point for _, curve in curves for point in curve]
    axes = Axes(_range(x for x, _ in points), _range((y for _, y in points), 0.08), ("minutes since run_start", "kW"))
    marked = extremes(result)
    for run, curve in curves:
        assert run.power
        axes.run([curve], _style(run, marked), f"{_name(run, marked)}: {run.power.mean_watts / 1e3:.3g} kW on average", [])
    return axes.svg("power over time", lambda v: f"{v:.3g}")


def time_chart(result: Result) -> str:
    """Minutes of initialization, training and evaluation, one bar per run."""
    runs = [run for run in result.runs if run.train_minutes is not None]
    if not runs:
        return ""
    height = TOP + BOTTOM + BAR_PIXELS * len(runs)
    totals = [(run.init_minutes or 0) + (run.train_minutes or 0) for run in runs]
    axes = Axes((0, max(totals) or 1), (len(runs), 0), ("minutes", ""), height)
    marked = extremes(result)
    for index, run in enumerate(runs):
        start = 0.0
        for kind, minutes in time_split(run).items():
            corners = [(start, index + 0.1), (start + minutes, index + 0.1)]
            corners += [(start + minutes, index + 0.9), (start, index + 0.9)]
            axes.area(corners, f"time {kind}", f"{_name(run, marked)}: {kind} {minutes:.2f} minutes")
            start += minutes
        if len(runs) <= MOST_NAMED_BARS:
            words, style = marked.get(id(run), _short(run.path.stem)), f"end small {marked.get(id(run), '')}"
            axes.text((0, index + 0.5), words, style, (-5, 4))
    return axes.svg("time split", None)


def _short(stem: str, most: int = 7) -> str:
    """The end of a name, which tells runs apart."""
    return stem if len(stem) <= most else "…" + stem[1 - most :]


def time_split(run: Run) -> dict[str, float]:
    """Minutes by what they were spent on; training is what run_start to run_stop holds besides evaluation."""
    evaluation = run.eval_seconds / 60
    return {
        "init": run.init_minutes or 0.0,
        "train": max(0.0, (run.train_minutes or 0.0) - evaluation),
        "eval": evaluation,
    }
