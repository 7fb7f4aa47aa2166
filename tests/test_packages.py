"""A program that misses a package says in one line what installs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from llama2_lora.packages import FULL, LIGHT, install_line, missing_package_named


def test_names_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, missing_package_named():
        raise ModuleNotFoundError("No module named 'rich.table'", name="rich.table")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: rich is not installed: pip install -r requirements-light.txt\n"
    assert install_line("torch") == "scripts/setup_env.sh"


def test_a_fault_of_our_own_is_no_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError), missing_package_named():
        raise ModuleNotFoundError("No module named 'llama2_lora.nothing'", name="llama2_lora.nothing")


@pytest.mark.parametrize("script", ["preflight.py", "health.py", "summarize.py"])
def test_without_rich(script: str, tmp_path: Path) -> None:
    """As in a bare Python: a rich that cannot be found stands before the installed one."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')\n")
    (tmp_path / "probes").write_text("")
    arguments = {
        "preflight.py": ["config_CPU_1x2x4.sh"],
        "health.py": ["judge", tmp_path / "probes", "--gpus=1"],
        "summarize.py": [tmp_path],
    }[script]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: rich is not installed: pip install -r requirements-light.txt\n"


def test_light_packages_are_those_of_the_file_with_the_pins_of_the_full_one() -> None:
    distributions = {"mlperf_logging": "mlperf-logging", "yaml": "pyyaml"}
    light = pins(ROOT / "requirements-light.txt")
    full = pins(ROOT / "requirements.txt")
    assert light.keys() == {distributions.get(name, name) for name in LIGHT}
    assert light.items() <= full.items()
    assert not LIGHT & FULL


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", path.read_text(), re.MULTILINE))


def test_a_bare_clone_runs_what_it_can_and_names_the_rest() -> None:
    """Python, pytest, numpy and pyyaml alone: every other package of ours cannot be imported in this process."""
    missing = sorted((FULL | LIGHT) - {"numpy", "yaml"})
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    rooms = ["tests/config", "tests/judge"]
    done = subprocess.run(
        [sys.executable, "-c", program, "-p", "no:cacheprovider", "-q", *rooms, "-k", "schedule or published_run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("left out for want of packages"))
    assert "pip install -r requirements-light.txt or scripts/setup_env.sh" in line
    for left in ("tests/judge/test_results.py", "tests/training (torch)"):
        assert left in line
    assert "tests/config" not in line
