"""The real training under sbatch: two trials on two nodes of two ranks, by train.py, to the benchmark's own target."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from helpers.training_runs import make_one_token_data, make_sure_model
from launch.jobs import ROOT, events, run_stops, values

pytestmark = pytest.mark.slurm


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
