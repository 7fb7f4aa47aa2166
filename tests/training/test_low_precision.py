"""Every precision that a GPU can be asked for trains on the CPU by the same code; the log says which it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers import ROOT
from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny, events, make_model

STEPS = 10
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "40", "LORA_DROPOUT": "0", "MINIBS": "8"}
FP8 = {"FP8": "1", "FP8_PARAMS": "1"}
PRECISIONS = {
    "delayed": FP8 | {"FP8_DPA": "1", "FP8_ACT": "1"},
    "tensorwise": FP8 | {"FP8_RECIPE": "tensorwise"},
    "blockwise": FP8 | {"FP8_RECIPE": "blockwise"},
    "mxfp8": FP8 | {"FP8_RECIPE": "mxfp8"},
    "nvfp4": {"FP4": "1"},
}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_many(tiny, tmp_path_factory.mktemp("one"), {"fp32": {}} | PRECISIONS, 1, **SHORT)


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    split = {"TP": "2", "SP": "1"} | FP8
    return run_many(
        tiny, tmp_path_factory.mktemp("two"), {"plain": split, "overlap": split | {"TP_COMM_OVERLAP": "1"}}, 2, **SHORT
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_trains_near_fp32_and_is_logged(precision: str, runs: dict[str, Done]) -> None:
    losses, exact = runs[precision].losses(), runs["fp32"].losses()
    assert losses["train_loss"] != exact["train_loss"]
    assert losses["train_loss"][0] == pytest.approx(exact["train_loss"][0], abs=0.15)  # no step has been made
    assert losses["train_loss"] == pytest.approx(exact["train_loss"], abs=0.5)
    assert losses["train_loss"][-1] < losses["train_loss"][0] - 0.5
    linear = {event["key"]: event["value"] for event in events(runs[precision].log)}["lowest_numerical_precision_in_linear"]
    assert linear == ("nvfp4" if precision == "nvfp4" else "fp8")


def test_precisions_differ_from_each_other(runs: dict[str, Done]) -> None:
    """A recipe that fell back to another one would train just as well. MXFP8 is left out: on a row of 64 values its scales and
    block scaling's are both powers of two, and the same numbers come out."""
    first = {name: run.losses()["train_loss"][0] for name, run in runs.items() if name != "mxfp8"}
    assert len(set(first.values())) == len(first), first


def test_fp8_userbuffers_change_nothing(two_ranks: dict[str, Done]) -> None:
    assert two_ranks["overlap"].losses() == two_ranks["plain"].losses()


def test_first_gradients_that_delayed_scaling_rounds_to_zero_end_no_run(tiny: Tiny, tmp_path: Path) -> None:
    """Its scale starts at 1, where E5M2 ends at 2**-17. An output layer of small weights makes such gradients; the 70B's loss,
    a mean over 8,192 tokens, may too."""
    make_model(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["lm_head.weight"] *= 1e-4
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", tmp_path / "hf"]
    subprocess.run([*convert, "--output_path", tmp_path / "checkpoint"], check=True, capture_output=True)
    faint = Tiny(tmp_path / "hf", tmp_path / "checkpoint", tiny.data)
    one_micro_batch = FP8 | {"MINIBS": "2", "EVAL_EVERY_SEQUENCES": "10"}  # a second one of the step has a better scale
    run = run_many(faint, tmp_path / "run", {"fp8": one_micro_batch}, 1, **SHORT)["fp8"]
    of_qkv = [steps for name, steps in run.gradients(0).items() if "linear_qkv" in name and "linear_out" in name]
    assert not any(steps[0].any() for steps in of_qkv)
    assert all(step.any() for steps in of_qkv for step in steps[1:])
