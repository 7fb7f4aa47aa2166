"""install_image.sh on a base that has torch: nothing of the base is replaced, Transformer Engine comes where it lacks.

An image cannot be built here: `python` is a stand-in that keeps a list of installed packages.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from helpers import ROOT

SCRIPT = ROOT / "scripts/lib/install_image.sh"
PYTHON = """#!/bin/bash
cd "$(dirname "$0")"
case "$*" in
  -) grep -v engine installed ;;
  *transformer_engine*m.version* | *m.version*transformer_engine*) sed -n 's/^transformer-engine==//p' installed ;;
  *torch.version.cuda*) echo 13 ;;
  *"pip --version") [ ! -e no_pip ] ;;
  "-c "*) ;;
  *requirements.txt)
    cat "$5" >constraint
    [ ! -e adds ] || echo nvidia-new==1 >>installed
    [ ! -e replaces ] || sed -i 's/^torch==.*/torch==9/' installed
    ;;
  *) echo "$@" >transformer_engine ;;
esac
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "installed").write_text("torch==2.9.0a0+nv25.9\ntransformer-engine==2.9.0+abc\n")
    return tmp_path


def install(base: Path, what: str = "packages") -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, what], env={"PATH": f"{base}:{os.environ['PATH']}"}, capture_output=True, text=True)


def test_the_bases_packages_constrain_ours(base):
    assert install(base).returncode == 0
    assert (base / "constraint").read_text() == "torch==2.9.0a0+nv25.9\n"
    assert not (base / "transformer_engine").exists()


def test_what_comes_in_addition_does_not_fail_the_build(base):
    (base / "adds").touch()
    assert install(base).returncode == 0


def test_an_environment_that_uv_made_has_no_pip(base):
    (base / "no_pip").touch()
    done = install(base)
    assert done.returncode == 1
    assert "has neither pip nor uv" in done.stderr
    (base / "uv").write_text('#!/bin/bash\necho "$@" >"$(dirname "$0")/uv_called"\n')
    (base / "uv").chmod(0o755)
    assert install(base).returncode == 0
    called = (base / "uv_called").read_text()
    assert called.startswith(f"pip install --python {base}/python --constraint /")
    assert called.endswith("/requirements.txt\n")


def test_a_replaced_torch_fails_the_build(base):
    (base / "replaces").touch()
    done = install(base)
    assert done.returncode == 1
    assert "torch==2.9.0a0+nv25.9" in done.stderr


@pytest.mark.parametrize("version", ["", "transformer-engine==2.12.0\n"])
def test_transformer_engine_is_built_where_the_base_has_another(base, version):
    (base / "installed").write_text(f"torch==2.10.0\n{version}")
    assert install(base).returncode == 0
    assert "transformer_engine_cu13==2.9.0 transformer_engine_torch==2.9.0" in (base / "transformer_engine").read_text()


@pytest.fixture
def site_packages(tmp_path):
    """A folder of libraries in a venv's place, as a base with CUDA has them."""
    python = tmp_path / "venv"
    venv.create(python, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(python)}))
    packages = {"nemo_toolkit": "2.7.3", "megatron_core": "0.15.3", "transformer_engine": "2.9.0+abc", "torch": "2.9.0"}
    for package, version in packages.items():
        (site / f"{package}-{version}.dist-info").mkdir()
        (site / f"{package}-{version}.dist-info/METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    for name in ("nemo/collections/llm", "megatron/core", "transformer_engine", "torch"):
        make_module(site / name)
    (site / "torch/__init__.py").write_text("class version:\n    cuda = '13.0'\n")
    return site


def make_module(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()


def check(site: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [site.parents[2] / "bin/python", ROOT / "scripts/check_image.py"]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_the_pinned_libraries_pass(site_packages):
    done = check(site_packages)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"megatron.core 0.15.3 from {site_packages}/megatron/core/__init__.py" in done.stdout


def test_a_source_tree_on_pythonpath_and_a_wrong_version_are_named(site_packages, tmp_path):
    make_module(tmp_path / "tree/megatron/core")
    (tmp_path / "tree/megatron/__init__.py").touch()
    (site_packages / "transformer_engine-2.9.0+abc.dist-info/METADATA").write_text(
        "Name: transformer_engine\nVersion: 2.12.0\n"
    )
    done = check(site_packages, PYTHONPATH=str(tmp_path / "tree"))
    assert done.returncode == 1
    assert f"error: megatron.core is imported from {tmp_path}/tree/megatron/core/__init__.py, not from site" in done.stderr
    assert "error: transformer_engine is 2.12.0, must be 2.9" in done.stderr


def test_a_library_that_cannot_be_imported_is_named_but_a_missing_driver_is_none(site_packages):
    (site_packages / "nemo/collections/llm/__init__.py").write_text("import nowhere\n")
    (site_packages / "transformer_engine/__init__.py").write_text(
        "raise OSError('libcuda.so.1: cannot open shared object file')\n"
    )
    done = check(site_packages)
    assert done.stderr == "error: nemo.collections.llm cannot be imported: ModuleNotFoundError: No module named 'nowhere'\n"


def test_a_login_shell_of_debian_keeps_the_images_python_and_a_writable_home(tmp_path):
    """As Enroot starts one: /etc/profile sets PATH anew; and HOME is that of a user whom the image does not know."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    variables = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "LOGIN_PROFILE": str(tmp_path / "llama2_lora.sh")}
    assert subprocess.run([SCRIPT, "login", tmp_path / "venv"], env=variables).returncode == 0
    login = f'PATH=/usr/local/bin:/usr/bin:/bin; . "{tmp_path}/llama2_lora.sh"; echo "$PATH $HOME"'
    shown = subprocess.run(["sh", "-c", login], env=variables, capture_output=True, text=True).stdout
    assert shown == f"{tmp_path}/venv/bin:/usr/local/bin:/usr/bin:/bin /tmp\n"
