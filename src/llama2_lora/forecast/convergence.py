"""How many sequences a run should take: the reference convergence points (RCP), and the bound below which it is too fast.

mlperf_logging.rcp_checker compares the mean of a submission's runs with these points. It drops points that lie above the
line between their neighbours, interpolates between the others, and fails a mean that a one-sided t-test at 5% calls
faster than the reference. A mean between that bound and the reference is scaled up to the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from llama2_lora.config import rules


@dataclass(frozen=True)
class Point:
    """Sequences to converge at one GBS: olympic mean and standard deviation of `runs` reference runs."""

    gbs: int
    mean: float
    deviation: float
    runs: int


# mlperf_logging 4.1.68, rcp_checker/training_6.1.0/rcps_llama2_70b_lora.json: 20 bf16 runs a point.
POINTS = (
    Point(8, 3178.667, 299.914, 20),
    Point(16, 4032.000, 411.346, 20),
    Point(32, 6037.333, 323.564, 20),
    Point(128, 11264.000, 844.800, 20),
)
# One-sided 5% quantile of Student's t, by degrees of freedom (runs of both sides, less 2).
T_QUANTILE = {24: 1.710882, 26: 1.705618}


@dataclass(frozen=True)
class Convergence:
    """In sequences. mean: what the reference runs took. reference: what the checker compares with, which is the same but
    at points that it drops. bound: the smallest mean of a submission that passes."""

    mean: float
    deviation: float
    reference: float
    bound: float


def expected(gbs: int) -> Convergence | None:
    """What runs with GBS `gbs` should take; None above the largest reference, where the checker fails any submission.

    Below the smallest GBS the smallest one's point counts, as in the checker.
    """
    points = _pruned(POINTS)
    if gbs > points[-1].gbs:
        return None
    point = _between(points, max(gbs, points[0].gbs))
    reference_runs = point.runs - 2 if point in points else point.runs  # interpolated points do not lose their extremes
    measured = next((p for p in POINTS if p.gbs == gbs), point)
    bound = _bound(point.mean, point.deviation, reference_runs)
    return Convergence(measured.mean, measured.deviation, point.mean, bound)


def _between(points: list[Point], gbs: int) -> Point:
    for low, high in pairwise(points):
        if gbs == low.gbs:
            return low
        if gbs < high.gbs:
            share = (gbs - low.gbs) / (high.gbs - low.gbs)
            mean, deviation = (a + share * (b - a) for a, b in ((low.mean, high.mean), (low.deviation, high.deviation)))
            return Point(gbs, mean, deviation, low.runs)
    return points[-1]


def _bound(mean: float, deviation: float, reference_runs: int) -> float:
    """The mean at which the t-test of two samples with equal deviations is at 5%."""
    runs = rules.RUNS_PER_RESULT - 2
    freedom = reference_runs + runs - 2
    pooled = deviation * math.sqrt(1 / reference_runs + 1 / runs)
    return mean - T_QUANTILE[freedom] * pooled


def _pruned(points: tuple[Point, ...]) -> list[Point]:
    """Without the points that are slower than the line between their neighbours, from the smallest GBS on."""
    kept = list(points)
    i = 1
    while i < len(kept) - 1:
        if kept[i].mean > _between([kept[i - 1], kept[i + 1]], kept[i].gbs).mean:
            del kept[i]
        else:
            i += 1
    return kept
