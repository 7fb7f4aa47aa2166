"""The reference points against the official checker's own arithmetic."""

from __future__ import annotations

import pytest
from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

from llama2_lora.forecast.convergence import POINTS, expected

# Worked by the checker (facts of ruleset 6.1.0): mean that passes at least.
BOUNDS = {8: 2961, 9: 3061, 16: 3733, 64: 6705, 72: 7200, 128: 10650}


@pytest.mark.parametrize(("gbs", "bound"), BOUNDS.items())
def test_bounds(gbs: int, bound: int) -> None:
    assert round(expected(gbs).bound) == bound


@pytest.fixture(scope="module")
def checker() -> RCP_Checker:
    return RCP_Checker("training", "6.1.0", "llama2_70b_lora", verbose=False)


def test_points_are_those_of_the_checker(checker: RCP_Checker) -> None:
    records = sorted(checker.rcp_data.values(), key=lambda record: record["BS"])
    assert [(p.gbs, p.runs) for p in POINTS] == [(r["BS"], len(r["Epochs to converge"])) for r in records]
    assert [p.mean for p in POINTS] == pytest.approx([r["RCP Mean"] for r in records], abs=1e-3)
    assert [p.deviation for p in POINTS] == pytest.approx([r["RCP Stdev"] for r in records], abs=1e-3)


@pytest.mark.parametrize("gbs", [8, 9, 12, 16, 24, 32, 48, 64, 100, 128])
def test_reference_and_bound_are_those_of_the_checker(checker: RCP_Checker, gbs: int) -> None:
    record = checker._find_rcp(gbs, "pruned_rcps")
    if record is None:
        low, high = (find(gbs, "pruned_rcps") for find in (checker._find_top_min_rcp, checker._find_bottom_max_rcp))
        record = checker._create_interp_rcp(gbs, low, high)[1]
    assert expected(gbs).reference == pytest.approx(record["RCP Mean"], abs=0.01)
    assert expected(gbs).bound == pytest.approx(record["Min Epochs"], abs=0.01)


def test_a_dropped_point_still_says_what_the_reference_took() -> None:
    assert expected(32).mean == pytest.approx(6037.3, abs=0.1)
    assert expected(32).reference < 5100


def test_outside_the_points() -> None:
    assert expected(4) == expected(8)
    assert expected(129) is None
