"""A measured rank: the arithmetic of a few layers, the file, and what preflight makes of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import rich  # noqa: F401  preflight.py prints with it: without it there is nothing to test here

from helpers import ROOT
from helpers.training_runs import clean_environment
from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.forecast import measured
from llama2_lora.forecast.measured import Measured, MeasuredMemory, MemoryItem, Names, Pass
from llama2_lora.forecast.plan import plan
from llama2_lora.forecast.times import Times
from llama2_lora.forecast.timing import FITTED, HEAL_SECONDS

CONFIG = ROOT / "config_DGXH100_1x8x4.sh"


@pytest.fixture
def settings() -> Settings:
    return Settings.from_env(source(CONFIG))


@pytest.fixture
def few(settings: Settings) -> Measured:
    """4 and 2 of 80 layers: 0.1 s and 0.04 s a layer for a step, 0.5 s and 0.01 s a layer for an evaluation."""
    items = [
        MemoryItem(Names.OUTSIDE, 1_000, False),
        MemoryItem(Names.LINEAR, 4_000, True),
        MemoryItem(Names.SWIGLU, 400, True),
    ]
    return Measured(
        config="DGXH100_1x8x4",
        gpu="NVIDIA H100 80GB HBM3",
        accelerator="H100",
        model_layers=80,
        stage_layers=80,
        settings=measured.deciding(settings),
        software={},
        passes=[Pass(4, [0.26, 0.26, 0.9], 0.54), Pass(2, [0.18, 0.18, 0.18], 0.52)],
        memory=MeasuredMemory(4, items, peak=6_000, slack=60, outside=500),
        complete=True,
    )


def test_a_few_layers_stand_for_all(few: Measured) -> None:
    """The median step: 0.1 + 80 * 0.04; 0.5 + 80 * 0.01. Bytes: 6,000 + 76 * (4,400 / 4), 1% more reserved, 500 outside."""
    assert few.step_seconds == pytest.approx(3.3)
    assert few.eval_seconds == pytest.approx(1.3)
    assert few.memory_bytes == pytest.approx((6_000 + 76 * 1_100) * 1.01 + 500, abs=1)
    assert few.extrapolated == "2 and 4 layers for 80"


def test_all_layers_are_what_they_are(few: Measured) -> None:
    whole = replace(few, stage_layers=4)
    assert (whole.step_seconds, whole.eval_seconds, whole.extrapolated) == (0.26, 0.54, "")
    assert whole.memory_bytes == 6_560


def test_the_file_holds_it_all(few: Measured, tmp_path: Path) -> None:
    measured.write(few, tmp_path / "m.json")
    assert measured.read(tmp_path / "m.json") == few


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 2, "passes": 3}'])
def test_another_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: is no file of scripts/measure.py") as caught:
        measured.read(path)
    assert "\n" not in str(caught.value)


def test_a_measurement_without_a_step_is_refused(few: Measured, tmp_path: Path) -> None:
    measured.write(replace(few, passes=[]), tmp_path / "m.json")
    with pytest.raises(ValueError, match="measure again"):
        measured.read(tmp_path / "m.json")


def test_the_forecast_takes_the_measured_step(few: Measured, settings: Settings) -> None:
    """What the cluster adds is the fit's: the same seconds on any measured step, times the same straggling."""
    found, slower = plan(settings, few), plan(settings, replace(few, passes=[Pass(80, [4.3], 1.3)]))
    assert found.forecast
    assert slower.forecast
    assert found.forecast.step_seconds.middle > 3.3
    straggling = 1 + FITTED.near_stragglers * 3  # of 8 GPUs in one domain
    assert slower.forecast.step_seconds.middle - found.forecast.step_seconds.middle == pytest.approx(1.0 * straggling)
    assert found.forecast.measured == "NVIDIA H100 80GB HBM3"


def test_the_account_takes_the_measured_memory(few: Measured, settings: Settings) -> None:
    """Measured total, and from the account what one rank alone does not have: userbuffers and NCCL's channels."""
    account, found = plan(settings).memory, plan(settings, few).memory
    assert account
    assert found
    alone = {item.name: item.bytes for item in account.items if item.source != "measured"}
    cluster = alone["userbuffers"] + sum(size for name, size in alone.items() if name.startswith("NCCL"))
    assert found.total == pytest.approx(few.memory_bytes + cluster)
    assert {item.name for item in found.items} >= {Names.LINEAR, "userbuffers"}
    assert next(item.bytes for item in found.items if item.name == Names.LINEAR) == 80_000


def test_every_item_of_the_account_has_its_place(few: Measured, settings: Settings) -> None:
    """Both columns add up: no item of preflight's account is lost or counted twice beside the measured kinds."""
    account = plan(settings).memory
    assert account
    rows = measured.beside(few, account)
    assert sum(theirs for *_, theirs in rows) == pytest.approx(account.total)
    assert {name for name, ours, _ in rows if ours is None} == {
        "working set of one layer",
        "allocator slack",
        "userbuffers",
        "NCCL, 4 communicators",
        "CUDA context and libraries",
    }


def preflight(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/preflight.py", CONFIG, "--measured", path, *more]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)


def test_preflight_reads_the_file(few: Measured, tmp_path: Path) -> None:
    measured.write(few, tmp_path / "m.json")
    done = preflight(tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    assert "one rank measured on NVIDIA H100 80GB HBM3" in done.stdout
    assert "extrapolated: 2 and 4 layers for 80" in done.stdout
    values = json.loads(preflight(tmp_path / "m.json", "--json").stdout)
    assert values["forecast"]["measured"] == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"settings": {"TP": 2}}, 1, "error: TP=4: the measured rank had 2"),
        (
            {"gpu": "NVIDIA A100-SXM4-80GB", "accelerator": ""},
            0,
            "warning: measured on NVIDIA A100-SXM4-80GB, the config names H100",
        ),
        ({"complete": False}, 0, "warning: the measurement was stopped"),
        ({"finite": False}, 0, "warning: values became infinite or NaN"),
    ],
)
def test_what_the_file_cannot_say_is_said(few: Measured, tmp_path: Path, change: dict, status: int, says: str) -> None:
    measured.write(replace(few, **change), tmp_path / "m.json")
    done = preflight(tmp_path / "m.json")
    assert done.returncode == status
    assert says in done.stdout


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = preflight(tmp_path / "none.json")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/none.json: No such file or directory\n")


def of(config: str, few: Measured, **changes: str) -> tuple[Measured, Settings]:
    """A rank of this config: 3.3 s a step, 1.3 s an evaluation."""
    settings = Settings.from_env(source(ROOT / config) | changes)
    part = settings.system.accelerator
    decided = measured.deciding(settings)
    return replace(few, settings=decided, gpu=part, accelerator=part, passes=[Pass(80, [3.3], 1.3)]), settings


def forecasts(config: str, few: Measured, **changes: str) -> list[Times]:
    """Of its measured rank: as it is, and changed."""
    found = [plan(settings, rank).forecast for rank, settings in (of(config, few), of(config, few, **changes))]
    assert all(found)
    return found


def test_a_run_in_fp4_is_forecast_with_its_healing(few: Measured) -> None:
    """GBS 8: 350 steps in FP4, the pause, and slower steps for the rest of the run; without FP4_HEAL_STEP none of it."""
    found, stays = forecasts("config_DGXB200_FP4_1x8x1.sh", few, FP4_HEAL_STEP="")
    assert (stays.fp4_step_seconds, stays.healed_step_seconds) == (None, None)
    assert found.fp4_step_seconds == stays.step_seconds
    fp4, fp8 = found.fp4_step_seconds.middle, found.healed_step_seconds.middle
    assert fp8 > 1.2 * fp4
    steps = (stays.run_minutes.middle * 60 - stays.evaluations * stays.eval_seconds.middle) / fp4
    healed = 350 * fp4 + HEAL_SECONDS + (steps - 350) * fp8 + found.evaluations * found.eval_seconds.middle
    assert found.run_minutes.middle * 60 == pytest.approx(healed)


def test_an_evaluation_of_whole_rows_waits_for_no_context_parallel_neighbour(few: Measured) -> None:
    """CP8, TP1: with VAL_CP=1 nothing is exchanged, so the cluster adds stragglers alone to the measured evaluation."""
    cut, whole = forecasts("config_GB200_18x4x1.sh", few, VAL_CP="1")
    assert whole.step_seconds == cut.step_seconds
    stragglers = 1 + FITTED.near_stragglers * math.log2(72)
    assert whole.eval_seconds.middle == pytest.approx(1.3 * stragglers)
    rounds = 20  # of 173 rows on 9 replicas
    exchanged = rounds * FITTED.cp_layer_seconds * 80 / 2
    assert cut.eval_seconds.middle == pytest.approx((1.3 + exchanged) * stragglers)


def test_an_evaluation_of_whole_rows_is_that_of_a_config_without_context_parallelism(few: Measured) -> None:
    whole, without = (plan(of("config_GB200_18x4x1.sh", few, **{name: "1"})[1]).forecast for name in ("VAL_CP", "CP"))
    assert whole
    assert without
    assert whole.eval_seconds == without.eval_seconds
