"""Three charts of a result as inline SVG: loss over the published envelope, throughput over time, where the time went.

Colours are CSS classes of report.py's page, so that the page's light and dark scheme hold. Hovering names the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from llama2_lora.config import rules
from llama2_lora.judge.published import envelope
from llama2_lora.judge.results import Result
from llama2_lora.judge.run import Run

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
BAR_PIXELS = 18  # per run in the time chart
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

    def line(self, points: Sequence[Point], style: str, title: str = "", dots: bool = False) -> None:
        path = " ".join(map(self.at, points))
        marks = "".join(self._dot(p) for p in points) if dots else ""
        self.parts.append(f'<g class="{style}">{_title(title)}<polyline points="{path}"/>{marks}</g>')

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
        names = (
            f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{self.height - 6}">{self.labels[0]}</text>'
            f'<text class="mid" transform="translate(12 {middle}) rotate(-90)">{self.labels[1]}</text>'
        )
        size = f'viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(name)}"'
        return f'<svg class="chart" {size}>{"".join(grid)}{"".join(self.parts)}{names}</svg>'

    def _dot(self, point: Point) -> str:
        x, y = self.at(point).split(",")
        return f'<circle cx="{x}" cy="{y}" r="2.5"/>'

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


def _style(run: Run) -> str:
    return "run" if run.converged else "run bad"


def _range(values: Iterable[float], margin: float = 0.04) -> Point:
    values = list(values)
    low, high = min(values), max(values)
    space = (high - low or abs(high) or 1.0) * margin
    return low - space, high + space


def loss_chart(result: Result) -> str:
    """Evaluation loss against training sequences, over what was published for this GBS."""
    published = envelope(result.config.get("global_batch_size"))
    points = [point for run in result.runs for point in run.evaluations]
    if not points:
        return ""
    usual = next((row.sequences for row in published if row.share_converged >= 0.5), 0)
    end = max(usual, *(s * 1.1 for s, _ in points))
    published = [row for row in published if row.sequences <= end]
    losses = [loss for _, loss in points] + [rules.TARGET_LOSS]
    losses += [v for row in published for v in (row.p05, row.p95)]
    sequences = [s for s, _ in points] + [row.sequences for row in published]
    axes = Axes(_range(sequences), _range(losses), ("training sequences", "evaluation loss (nats)"))
    if published:
        low = [(row.sequences, row.p05) for row in published]
        high = [(row.sequences, row.p95) for row in reversed(published)]
        axes.area(low + high, "band", f"published 70B runs, GBS {published[0].gbs}: 5% to 95%")
        axes.line([(row.sequences, row.median) for row in published], "median", "median of the published 70B runs")
    axes.line([(axes.x[0], rules.TARGET_LOSS), (axes.x[1], rules.TARGET_LOSS)], "target")
    axes.text((axes.x[0], rules.TARGET_LOSS), f"target {rules.TARGET_LOSS}", "small", (4, 12))
    for run in result.runs:
        if run.evaluations:
            title = f"{run.path.name}, seed {run.seed}: {run.evaluations[-1][1]:.4f} at {run.evaluations[-1][0]:,}"
            axes.line([(s, loss) for s, loss in run.evaluations], _style(run), title, dots=True)
    return axes.svg("evaluation loss against training sequences", lambda v: f"{v:.3g}")


def throughput_chart(result: Result) -> str:
    """Training sequences per second of each block between evaluations, against minutes since run_start."""
    runs = [run for run in result.runs if run.blocks]
    if not runs:
        return ""
    speeds = [count / seconds for run in runs for _, seconds, count in run.blocks]
    end = max(stop for run in runs for stop, _, _ in run.blocks) / 60
    axes = Axes((0, end or 1), (0, max(speeds) * 1.08), ("minutes since run_start", "training sequences/s"))
    for run in runs:
        steps = [((stop - back) / 60, count / seconds) for stop, seconds, count in run.blocks for back in (seconds, 0.0)]
        axes.line(steps, _style(run), f"{run.path.name}: {run.samples_per_second:.2f} sequences/s")
    return axes.svg("throughput over time", lambda v: f"{v:g}")


def time_chart(result: Result) -> str:
    """Minutes of initialization, training and evaluation, one bar per run."""
    runs = [run for run in result.runs if run.train_minutes is not None]
    if not runs:
        return ""
    height = TOP + BOTTOM + BAR_PIXELS * len(runs)
    totals = [(run.init_minutes or 0) + (run.train_minutes or 0) for run in runs]
    axes = Axes((0, max(totals) or 1), (len(runs), 0), ("minutes", "runs"), height)
    for index, run in enumerate(runs):
        start = 0.0
        for kind, minutes in time_split(run).items():
            corners = [(start, index + 0.1), (start + minutes, index + 0.1)]
            corners += [(start + minutes, index + 0.9), (start, index + 0.9)]
            axes.area(corners, f"time {kind}", f"{run.path.name}: {kind} {minutes:.2f} minutes")
            start += minutes
    return axes.svg("time split", None)


def time_split(run: Run) -> dict[str, float]:
    """Minutes by what they were spent on; training is what run_start to run_stop holds besides evaluation."""
    evaluation = run.eval_seconds / 60
    return {
        "init": run.init_minutes or 0.0,
        "train": max(0.0, (run.train_minutes or 0.0) - evaluation),
        "eval": evaluation,
    }
