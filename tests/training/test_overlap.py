"""The userbuffers that the H100 configs ship (TP 4, SP) give the losses and gradients of no overlap, in fp32 and in FP8.

Transformer Engine's own `initialize_ub` and control flow run; the collectives behind the buffers block. What a setting leaves
out of a sum is left out here too: bulk overlap on the frozen base leaves the input's gradient unsummed over the ranks.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from helpers import ROOT
from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny, make_model

FP8 = {"FP8": "1", "FP8_PARAMS": "1"}
OVERLAP = {"TP_COMM_OVERLAP": "1", "ACCELERATOR": "H100"}
RUNS = {"plain": {}, "overlap": OVERLAP, "fp8": FP8, "fp8_overlap": FP8 | OVERLAP}
COMMON = {"TP": "4", "SP": "1", "MINIBS": "8", "MAX_STEPS": "6", "LORA_DROPOUT": "0"}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("tp4")
    # FP8 wants multiples of 16 on every rank
    make_model(folder / "hf", hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", folder / "hf"]
    subprocess.run([*convert, "--output_path", folder / "checkpoint"], check=True, capture_output=True)
    return run_many(Tiny(folder / "hf", folder / "checkpoint", tiny.data), folder, RUNS, 4, **COMMON)


@pytest.mark.parametrize(("plain", "overlap"), [("plain", "overlap"), ("fp8", "fp8_overlap")])
def test_shipped_overlap_gives_the_gradients_of_none(plain: str, overlap: str, runs: dict[str, Done]) -> None:
    for key, expected in runs[plain].losses().items():
        assert runs[overlap].losses()[key] == pytest.approx(expected, abs=1e-5)
    for rank in range(4):
        expected_gradients, gradients = runs[plain].gradients(rank), runs[overlap].gradients(rank)
        for name, expected in expected_gradients.items():
            assert np.abs(gradients[name] - expected).max() < 1e-5, name


def test_userbuffers_were_made(runs: dict[str, Done]) -> None:
    """Transformer Engine says so on stdout; without it the comparison would be of a run with itself."""
    made = {name: "[UB] Number of TP domains: 1" in run.log for name, run in runs.items()}
    assert made == {"plain": False, "overlap": True, "fp8": False, "fp8_overlap": True}


def test_fp8_is_not_fp32(runs: dict[str, Done]) -> None:
    losses = {name: run.losses()["train_loss"] for name, run in runs.items()}
    assert max(abs(a - b) for a, b in zip(losses["plain"], losses["fp8"], strict=True)) > 1e-4
