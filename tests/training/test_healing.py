"""A run that leaves NVFP4 for FP8: the same as one in FP4 up to the switch, another one after it, and it goes on learning.

The warm-up has run what comes after the switch before the clock starts, and leaves no trace of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from helpers.many_runs import Done, run_many
from helpers.on_the_clock import watch_compilation, watch_kernels
from helpers.training_runs import Tiny, events, free_port, make_model, run_worker, train_here, values

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


# ---- Warm-up ---------------------------------------------------------------------------------------------------------


def worker(environments: list[dict[str, str]], file: Path) -> None:
    """The first run is the one that is watched: what the others do for the first time, it may have done before."""
    report: dict[str, Any] = {}
    watch_compilation(report)
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        import nemo.lightning  # noqa: F401  Megatron's modules in their order
    watch_kernels(report)
    for number, environment in enumerate(environments):
        print("run", flush=True)
        train_here(environment)
        if number == 0:
            file.write_text(json.dumps(report))


@pytest.fixture(scope="module", params=["copies", "weights"])
def warmed_up(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, Any]]:
    """Logs with and without warm-up, and what was called when in the first; four layers, of which the warm-up heals two."""
    folder = tmp_path_factory.mktemp("warmed_up")
    make_model(folder / "hf", num_hidden_layers=4)
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", folder / "hf"]
    subprocess.run([*convert, "--output_path", folder / "checkpoint"], check=True, capture_output=True)
    model = Tiny(folder / "hf", folder / "checkpoint", tiny.data)
    settings = SHORT | {"FP4_HEAL_STEP": str(HEAL), "FP4_PARAMS": str(int(request.param == "weights"))}
    environments = [
        model.environment(folder, WARMUP_TRAIN_STEPS=steps, WARMUP_VALIDATION_STEPS=steps, MASTER_PORT=free_port(), **settings)
        for steps in ("2", "0")
    ]
    output, report = run_worker(__file__, environments, folder / "report.json")
    return output.split("run\n")[1:], report


def test_nothing_is_called_or_compiled_for_the_first_time_on_the_clock(warmed_up: tuple[list[str], dict[str, Any]]) -> None:
    report = warmed_up[1]
    assert report["kernels before run_start"] > 20
    assert report["kernels after it only"] == []
    assert report["graphs at run_stop"] == report["graphs at run_start"] >= 2


def test_the_warm_up_of_both_precisions_leaves_no_trace(warmed_up: tuple[list[str], dict[str, Any]]) -> None:
    with_warm_up, without = warmed_up[0]
    for key, count in (("train_loss", STEPS), ("eval_accuracy", 2)):
        assert len(values(without, key)) == count
        assert values(with_warm_up, key) == values(without, key)


if __name__ == "__main__":
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "none")
    worker(json.loads(sys.argv[1]), Path(sys.argv[2]))
