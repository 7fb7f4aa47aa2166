"""A run that leaves NVFP4 for FP8: the same as one in FP4 up to the switch, another one after it, and it goes on learning."""

from __future__ import annotations

import pytest

from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny, events

STEPS, HEAL = 8, 4
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "32", "EVAL_SKIP": "0", "FP4": "1"}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    changes = {"fp4": {}, "healed": {"FP4_HEAL_STEP": str(HEAL)}}
    return run_many(tiny, tmp_path_factory.mktemp("healing"), changes, 1, **SHORT)


def test_fp4_up_to_the_switch(runs: dict[str, Done]) -> None:
    fp4, healed = (runs[name].losses()["train_loss"] for name in ("fp4", "healed"))
    assert len(healed) == STEPS
    assert healed[:HEAL] == fp4[:HEAL]
    assert healed[HEAL] != fp4[HEAL]  # the same adapter, other products


def test_the_switch_is_logged(runs: dict[str, Done]) -> None:
    stats = [e for e in events(runs["healed"].log, "tracked_stats") if "linear_precision" in e["value"]]
    assert [(e["value"], e["metadata"]["samples_count"]) for e in stats] == [({"linear_precision": "fp8"}, 8 * HEAL)]


def test_the_loss_has_no_jump(runs: dict[str, Done]) -> None:
    fp4, healed = (runs[name].losses()["eval_accuracy"] for name in ("fp4", "healed"))
    assert healed[0] == fp4[0]
    assert healed[1] == pytest.approx(fp4[1], abs=0.1)
    assert healed[1] < healed[0]
