"""Every config of a cluster trains on CPU ranks: sourced, reduced and run as `scripts/rehearse.sh --config` does it.

Model and data are such that the target is met from the start, so a log has all that the compliance checker asks for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.training_runs import clean_environment, events, make_one_token_data, make_sure_model, values
from llama2_lora.config import reduced, rules
from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.forecast import table

TRIAL = 'source scripts/rehearse.sh --help >/dev/null; train "$1" trial "$2" fp32'


@dataclass(frozen=True)
class Group:
    """Configs of one reduced run: they differ in their LR, their part's name and what libraries read."""

    run: Settings
    exported: dict[str, str]
    configs: list[str]


def groups() -> Iterator[Group]:
    found: dict[Settings, Group] = {}
    for config in table.configs():
        exported = source(config)
        settings = Settings.from_env(exported)
        if settings.rehearsal:
            continue
        run = Settings.from_env(exported | reduced.reduced(settings))
        key = replace(run, system=replace(run.system, name="", walltime=""), optimization=replace(run.optimization, lr=0.0))
        found.setdefault(key, Group(run, exported, [])).configs.append(config.name)
    yield from found.values()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rehearse.sh has prepared when it trains."""
    folder = tmp_path_factory.mktemp("reduced")
    (folder / "data").mkdir()
    make_one_token_data(folder / "data/gov_report", reduced.SEQUENCE_LENGTH)
    make_sure_model(folder / "base")
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", folder / "base"]
    subprocess.run([*convert, "--output_path", folder / "checkpoint_fp32"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("group", groups(), ids=lambda group: "+".join(name[7:-3] for name in group.configs))
def test_a_config_trains_evaluates_heals_and_complies(group: Group, prepared: Path) -> None:
    config, folder = group.configs[0], prepared / "runs" / group.configs[0]
    environment = clean_environment(REHEARSAL_DIR=str(prepared), TARGET_LOSS=str(rules.TARGET_LOSS))
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", TRIAL, "bash", folder, config], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for ruleset in rules.RULESETS:
        assert f"ruleset {ruleset}: passed" in done.stdout
    log, exported = (folder / "trial_1.log").read_text(), group.exported
    assert events(log, "run_stop")[0]["metadata"]["status"] == "success"
    assert len(values(log, "eval_accuracy")) == 1
    low = "nvfp4" if exported.get("FP4") == "1" else "fp8"
    assert values(log, "lowest_numerical_precision_in_linear") == [low]
    assert values(log, "lowest_numerical_precision_in_attn") == ["fp8" if exported.get("FP8_DPA") == "1" else "fp32"]
    assert values(log, "tensor_parallelism") == [min(int(exported["TP"]), 2)]
    assert values(log, "context_parallelism") == [min(int(exported["CP"]), 2)]
    assert values(log, "gradient_accumulation_steps") == [int(exported["MINIBS"])]
    healed = [stat for stat in values(log, "tracked_stats") if "linear_precision" in stat]
    assert healed == ([{"linear_precision": "fp8"}] if "FP4_HEAL_STEP" in exported else [])
    losses = values(log, "train_loss")
    assert losses[-1] < losses[0]
