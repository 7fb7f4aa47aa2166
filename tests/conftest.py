"""Fixtures of all rooms."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.training_runs import Tiny, make_data, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    made = Tiny(folder / "hf", folder / "checkpoint", folder / "data")
    make_model(made.hugging_face)
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", made.hugging_face]
    subprocess.run([*convert, "--output_path", made.checkpoint], check=True, capture_output=True)
    make_data(made.data)
    return made
