"""scripts/rehearse.sh: its arguments, its lock and what it shows of a log. Continuous integration runs the whole of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT

SCRIPT = ROOT / "scripts/rehearse.sh"


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], cwd="/", capture_output=True, text=True, timeout=60)


def shown(lines: str, **variables: str) -> list[str]:
    """What its filter makes of a log."""
    line = f'source "{SCRIPT}" --help >/dev/null; progress'
    done = subprocess.run(["bash", "-c", line], input=lines, env=variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def event(key: str, value: float | str) -> str:
    text = json.dumps({"namespace": "", "time_ms": 1, "event_type": "POINT_IN_TIME", "key": key, "value": value})
    return f':::MLLOG {text[:-1]}, "metadata": {{"samples_count": 1536}}}}\n'


def test_help():
    done = rehearse("--help")
    assert done.returncode == 0
    assert "scripts/rehearse.sh --text DIR" in done.stdout
    assert "set -euo" not in done.stdout


def test_wrong_arguments_are_refused():
    for arguments, problem in (
        (["--txt", "/tmp"], "unknown argument --txt"),
        (["--text", "/nowhere"], "--text /nowhere: is not"),
        (["--config", "/nowhere.sh"], "--config /nowhere.sh: is no file"),
        (["--gpu", "--config", ROOT / "config_GB200_2x4x2.sh"], "is reduced to CPU ranks; leave out --gpu"),
    ):
        done = rehearse(*arguments)
        assert done.returncode == 2
        assert problem in done.stderr


@pytest.fixture
def outline(tmp_path):
    """The project with the real configs and settings, where nothing is prepared and run.sub notes its environment."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for name in ("setup_env.sh", "rehearsal_data.py", "rehearsal_model.py", "convert_model.py"):
        (tmp_path / "scripts" / name).touch(0o755)
    (tmp_path / "run.sub").write_text('env -0 >"${LOGDIR}/env"\n')
    (tmp_path / "src").symlink_to(ROOT / "src")
    for config in ROOT.glob("config_*.sh"):
        (tmp_path / config.name).symlink_to(config)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_a_clusters_config_does_not_have_the_shells_settings(outline):
    """Those of a shell that launches jobs mean nothing to it, as to preflight; TARGET_LOSS may be set."""
    shell = {"LORA_RANK": "8", "FP8_RECIPE": "tensorwise", "VBOOST": "1", "GPU_CLOCKS": "1980", "TARGET_LOSS": "1.2"}
    line = [outline / "scripts/rehearse.sh", "--config", outline / "config_DGXH100_8x8x2.sh"]
    environment = shell | {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (noted,) = outline.glob("rehearsal/runs/*/env")
    found = dict(pair.split("=", 1) for pair in noted.read_text().split("\0") if pair)
    assert {name: found[name] for name in shell if name in found} == {"TARGET_LOSS": "1.2"}
    assert found["LR"] == "4e-4"


def test_gpus_that_are_not_there():
    done = rehearse("--gpu")
    assert done.returncode == 2
    assert done.stderr.startswith("rehearse.sh: error: --gpu: no GPU is visible")


def test_two_rehearsals_in_one_folder(tmp_path):
    """The second ends at once; the folder is free again when the first was killed."""
    line = f'source "{SCRIPT}" --help >/dev/null; lock folder; echo held; exec sleep "$1"'
    first = subprocess.Popen(["bash", "-c", line, "x", "100"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    second = subprocess.run(["bash", "-c", line, "x", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"another rehearsal (process {first.pid}) works in folder/" in second.stderr
    first.kill()
    first.wait()
    assert subprocess.run(["bash", "-c", line, "x", "0"], cwd=tmp_path).returncode == 0


def test_a_loss_above_the_target_does_not_read_as_one_that_reached_it():
    log = (
        event("train_loss", 1.23456)
        + event("eval_accuracy", 0.92509)
        + event("eval_accuracy", 0.92502)
        + event("eval_accuracy", 0.9)
    )
    assert shown(log + "noise\n") == [
        "  train loss 1.2346 after 1536 sequences",
        "  EVAL LOSS 0.9251 after 1536 sequences",
        "  EVAL LOSS 0.92502 after 1536 sequences",
        "  EVAL LOSS 0.9000 after 1536 sequences",
    ]
    assert shown(event("eval_accuracy", 1.20004), TARGET_LOSS="1.2") == ["  EVAL LOSS 1.20004 after 1536 sequences"]


def test_errors_and_verdicts_are_shown():
    log = "error: rank 0: no\nrun.sub: error: LOGDIR\nrun.sub: ruleset 5.1.0: passed\nrun.sub: probing every node\n"
    assert shown(log) == ["error: rank 0: no", "error: LOGDIR", "ruleset 5.1.0: passed"]


def test_a_long_silence_shows_a_line(tmp_path):
    line = f'sed "s/SILENCE=60/SILENCE=1/" "{SCRIPT}" >x; source ./x --help >/dev/null; (sleep 2.5; echo end) | progress'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "still at it after" in done.stdout
