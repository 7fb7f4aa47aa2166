"""scripts/setup_env.sh: the project is installed editable, and scripts find their own tree without that."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from helpers import ROOT


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A venv that holds setuptools alone and calls itself complete: the lock's 3 GB are not the matter here."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    shutil.rmtree(site / "setuptools", ignore_errors=True)
    shutil.copytree(Path(sysconfig.get_path("purelib")) / "setuptools", site / "setuptools")
    key = hashlib.sha256((ROOT / "requirements-cpu.txt").read_bytes()).hexdigest()
    (folder / ".complete").write_text(key + "\n")
    return folder


def run(*command, **variables: str) -> str:
    done = subprocess.run(command, cwd="/", env={"PATH": os.environ["PATH"]} | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_of_a_bare_clone_finds_its_own_tree():
    """With the packages that it needs, and nothing installed: -S leaves out the editable install."""
    shown = run(sys.executable, "-S", ROOT / "scripts/health.py", "--help", PYTHONPATH=sysconfig.get_path("purelib"))
    assert "probe" in shown


def test_wrong_arguments_are_refused():
    done = subprocess.run([ROOT / "scripts/setup_env.sh", "--cpu"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "[setup] error: unknown argument --cpu; see scripts/setup_env.sh --help\n")
    assert "--gpu" in run(ROOT / "scripts/setup_env.sh", "--help")


def test_a_wrong_switch_is_refused():
    """Not taken for 0: it would delete an environment and compile for half an hour."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "yes"}
    done = subprocess.run([ROOT / "scripts/setup_env.sh", "--gpu"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "[setup] error: DRY_RUN=yes: must be 0 or 1\n")


def test_the_steps_for_a_gpu_machine():
    """torch for CUDA 13 first, the pins, Transformer Engine against that torch, the project, and a look at what is imported."""
    lines = run(ROOT / "scripts/setup_env.sh", "--gpu", DRY_RUN="1", VENV="/v").splitlines()
    pins = (ROOT / "requirements.txt").read_text()
    engine = re.search(r"^transformer_engine==([\d.]+)", pins, re.M)[1]
    compiled = f"torch==2.9.0 transformer_engine[core_cu13,pytorch]=={engine}"
    steps = [
        "-m venv /v",
        "/v/bin/pip install --upgrade pip",
        "/v/bin/pip install --index-url https://download.pytorch.org/whl/cu130 torch==2.9.0",
        "/v/bin/pip install --group gpu -r requirements.txt",
        f"/v/bin/pip install --no-build-isolation {compiled} -r requirements.txt",
        "/v/bin/pip install --no-deps --no-build-isolation -e .",
        "/v/bin/python scripts/check_image.py",
    ]
    assert len(lines) == len(steps)
    for line, step in zip(lines, steps, strict=True):
        assert " ".join(shlex.split(line)).endswith(step)


def test_an_install_shows_progress():
    lines = "".join(f"Collecting package{n}==1 (from -r x)\n" for n in range(120)) + "Installing collected packages: a, b\n"
    line = 'source "$0" --help >/dev/null; progress'
    done = subprocess.run(
        ["bash", "-c", line, ROOT / "scripts/setup_env.sh"], input=lines, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "[setup] 50 packages found",
        "[setup] 100 packages found",
        "[setup] unpacking 120 packages",
    ]


def test_the_project_is_installed_from_the_tree(environment):
    before = set((ROOT / "src").iterdir())
    run(ROOT / "scripts/setup_env.sh", VENV=str(environment))
    where = run(environment / "bin/python", "-c", "import llama2_lora; print(llama2_lora.__file__)").strip()
    assert Path(where) == ROOT / "src/llama2_lora/__init__.py"
    assert set((ROOT / "src").iterdir()) == before, "nothing is left in the tree, which may be read-only"
    assert "is up to date" in run(ROOT / "scripts/setup_env.sh", VENV=str(environment), HOME="/nowhere")
