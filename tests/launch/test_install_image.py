"""scripts/install_image.sh on a base that has torch: nothing of the base is replaced, Transformer Engine comes where it lacks.

An image cannot be built here: `python` is a stand-in that keeps a list of installed packages.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/install_image.sh"
PYTHON = """#!/bin/bash
cd "$(dirname "$0")"
case "$*" in
  -) cat installed ;;
  *torch.version.cuda*) echo 13 ;;
  "-c "*) ;;
  *requirements.txt) cat "${PIP_CONSTRAINT}" >constraint; [ ! -e replaces ] || sed -i 's/^torch==.*/torch==9/' installed ;;
  *) echo "$@" >transformer_engine ;;
esac
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "installed").write_text("torch==2.9.0a0+nv25.9\ntransformer-engine==2.9.0+abc\n")
    return tmp_path


def install(base: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT], env={"PATH": f"{base}:{os.environ['PATH']}"}, capture_output=True, text=True)


def test_the_bases_packages_constrain_ours(base):
    assert install(base).returncode == 0
    assert (base / "constraint").read_text() == "torch==2.9.0a0+nv25.9\n"
    assert not (base / "transformer_engine").exists()


def test_a_replaced_torch_fails_the_build(base):
    (base / "replaces").touch()
    done = install(base)
    assert done.returncode == 1
    assert "the base's packages above were replaced" in done.stderr


@pytest.mark.parametrize("version", ["", "transformer-engine==2.12.0\n"])
def test_transformer_engine_is_built_where_the_base_has_another(base, version):
    (base / "installed").write_text(f"torch==2.10.0\n{version}")
    assert install(base).returncode == 0
    assert "transformer_engine_cu13==2.9.0 transformer_engine_torch==2.9.0" in (base / "transformer_engine").read_text()
