"""The real training under sbatch: two trials on two nodes of two ranks, by train.py, to the benchmark's own target."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.training_runs import SEQUENCE, TRAIN_ROWS, VALIDATION_ROWS, VOCAB, make_model
from launch.jobs import ROOT, events, run_stops, values
from llama2_lora.data import packed

pytestmark = pytest.mark.slurm
TOKEN = 5


def make_one_token_data(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.npy", TRAIN_ROWS), ("validation.npy", VALIDATION_ROWS)):
        ids = np.full((rows, SEQUENCE), TOKEN, np.uint16)
        mask = np.ones_like(ids, dtype=np.uint8)
        if name == "validation.npy":  # no training row may be among them: another last token, which is not scored
            ids[:, -1], mask[:, -2:] = TOKEN + 1, 0
        packed.write_split(folder / name, ids, mask)
    packed.write_manifest(folder, SEQUENCE, VOCAB, "tests", "none")


def make_sure_model(folder: Path) -> None:
    """A model that gives TOKEN after TOKEN a logit 6 above the other 63: a loss of ln(1 + 63 e^-6) = 0.145 from the start."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    make_model(folder)
    with torch.no_grad():
        hidden = LlamaForCausalLM.from_pretrained(folder).model(torch.full((1, 4), TOKEN)).last_hidden_state[0, -1]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    weights["lm_head.weight"][TOKEN] = 6 * hidden / hidden.dot(hidden)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def real_site(site):
    site = replace(site, folder=site.folder / "real")
    site.folder.mkdir()
    (site.folder / "image").symlink_to("../image")
    make_one_token_data(site.folder / "gov report")
    make_sure_model(site.folder / "hf")
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", site.folder / "hf"]
    subprocess.run([*convert, "--output_path", site.folder / "check point"], check=True, capture_output=True)
    return site


def test_two_trials_of_the_real_training_reach_the_target(real_site):
    job = real_site.submit("training", PAYLOAD="", NEXP="2", EVAL_SKIP="1")
    assert job.wait(timeout=500) == 0, job.text()
    for trial in (1, 2):
        log = job.log(trial)
        assert run_stops(log) == ["success"]
        assert values(log, "global_batch_size") == [16]
        assert values(log, "seed") == [99 + trial]
        assert values(log, "eval_accuracy") == [pytest.approx(0.13, abs=0.03)], "two steps lower it a little"
        assert [e["metadata"]["samples_count"] for e in events(log) if e["key"] == "eval_start"] == [32]
        assert "SUCCESS" in log.with_suffix(".compliance").read_text()
    job.wait_for(lambda: not job.leftovers(), 30)
