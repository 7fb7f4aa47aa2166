"""Fixtures of all rooms; and what runs in an environment without the large packages.

Where torch is missing, modules that import a package of the full environment are left out, and one line says which. Where
torch is there, the environment is meant to be the full one: then a missing package is an error like any other.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.training_runs import Tiny, make_data, make_model
from llama2_lora.packages import FULL, LIGHT, install_line

HAS_TORCH = importlib.util.find_spec("torch") is not None
left_out: dict[str, set[str]] = {}  # missing package -> folders or files of tests

if not HAS_TORCH:  # they import it in fixtures
    collect_ignore = ["training", "rehearsal"]
    left_out["torch"] = {"tests/rehearsal", "tests/training"}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call = getattr(report, "call", None)
    error = call.excinfo.value if call is not None and call.excinfo else None
    missing = _missing_package(error)
    if missing:
        left_out.setdefault(missing, set()).add(str(Path(collector.path).relative_to(ROOT)))
        report.outcome, report.longrepr, report.result = "passed", None, []
    return report


def _missing_package(error: BaseException | None) -> str:
    """The package of the full environment for want of which a module cannot be imported, or nothing."""
    while error is not None and not HAS_TORCH:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.split(".")[0]
            if package in LIGHT | FULL and importlib.util.find_spec(package) is None:
                return package
        error = error.__cause__ or error.__context__
    return ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out:
        files = ", ".join(f"{' '.join(sorted(where))} ({package})" for package, where in sorted(left_out.items()))
        fixes = " or ".join(sorted({install_line(package) for package in left_out}))
        terminalreporter.write_line(f"left out for want of packages, which {fixes} brings: {files}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    if not HAS_TORCH:
        pytest.skip("needs torch: scripts/setup_env.sh")
    folder = tmp_path_factory.mktemp("tiny")
    made = Tiny(folder / "hf", folder / "checkpoint", folder / "data")
    make_model(made.hugging_face)
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", made.hugging_face]
    subprocess.run([*convert, "--output_path", made.checkpoint], check=True, capture_output=True)
    make_data(made.data)
    return made
