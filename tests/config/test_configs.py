"""The shipped configs: their form, their row in docs/configs.md, what they export; and sourcing any config."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from helpers import ROOT
from llama2_lora.config.names import LIBRARIES, unknown
from llama2_lora.config.settings import Settings, SettingsError, variables
from llama2_lora.config.shell import source
from llama2_lora.forecast import table

CONFIGS = table.configs()
BY_NAME = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


def in_bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={"PATH": os.environ["PATH"]} | variables, capture_output=True, text=True
    )


def test_there_are_configs() -> None:
    assert {"config_CPU_1x2x4.sh", "config_DGXH100_1x8x4.sh", "config_DGXH100_8x8x2.sh"} <= {c.name for c in CONFIGS}


@BY_NAME
def test_row_in_the_page(config: Path) -> None:
    rows = (ROOT / "docs/configs.md").read_text().splitlines()
    assert table.row(config) in rows, f"PYTHONPATH=src {table.COMMAND}"


def test_page_lists_nothing_else() -> None:
    assert (ROOT / "docs/configs.md").read_text() == table.page(), f"PYTHONPATH=src {table.COMMAND}"


@BY_NAME
def test_form(config: Path) -> None:
    lines = config.read_text().splitlines()
    assert len(lines) <= 25
    assert re.fullmatch(rf"#   source {config.name} && sbatch .*run\.sub|#   scripts/rehearse\.sh( --gpu)?", lines[1])
    exported = {name for line in lines if line.startswith("export ") for name in re.findall(r"\b([A-Z][A-Z0-9_]+)=", line)}
    assert not exported & {"DGXNNODES", "DGXNGPU", "MINIBS"}, "they follow from DGXSYSTEM"


@BY_NAME
def test_exports_only_what_somebody_reads(config: Path) -> None:
    exported = source(config)
    assert list(unknown(exported, ours=True)) == []
    assert all(name.startswith(LIBRARIES) for name in exported.keys() - variables())


@BY_NAME
def test_named_after_its_values(config: Path) -> None:
    settings = Settings.from_env(source(config))
    assert config.stem == f"config_{settings.system.name}"
    shape = f"{settings.system.nodes}x{settings.system.gpus_per_node}x{settings.batch.minibs}"
    assert config.stem.endswith(f"_{shape}")


@BY_NAME
def test_sbatch_gets_its_nodes(config: Path) -> None:
    """What the README says to type, with a stand-in that prints sbatch's arguments."""
    done = in_bash(f'set -euo pipefail; sbatch() {{ echo "$@"; }}; source {config.name} && sbatch -N "$DGXNNODES" run.sub')
    nodes = re.search(r"_(\d+)x\d+x\d+\.sh", config.name)[1]
    assert done.stdout == f"-N {nodes} run.sub\n", done.stderr


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.name.startswith("config_GB")], ids=lambda path: path.stem)
def test_context_parallel_groups_stay_in_a_rack(config: Path) -> None:
    """Slurm places segments of this many nodes in one block; 18 nodes of 4 GPUs are a rack."""
    exported = source(config)
    segment = int(exported["SBATCH_SEGMENT_SIZE"])
    assert segment <= 18
    assert int(exported["DGXNNODES"]) % segment == 0
    assert segment * int(exported["DGXNGPU"]) % int(exported["CP"]) == 0


def test_submitter_may_be_set_before_sourcing() -> None:
    script = 'source config_DGXH100_1x8x4.sh && printf %s "$MLPERF_SUBMITTER"'
    assert in_bash(script, MLPERF_SUBMITTER="Our Site").stdout == "Our Site"


def test_a_renamed_config_is_refused(tmp_path: Path) -> None:
    for path in ROOT.glob("config_*.sh"):
        (tmp_path / path.name).write_text(path.read_text())
    renamed = tmp_path / "config_DGXH100_2x8x4.sh"
    (tmp_path / "config_DGXH100_1x8x4.sh").rename(renamed)
    with pytest.raises(SettingsError, match=r"CONFIG_FILE=config_DGXH100_2x8x4\.sh: must be config_DGXH100_1x8x4\.sh"):
        Settings.from_env(source(renamed))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"export MLPERF_SUBMITTER='caf\xe9'\n", "no UTF-8"),
        (b"export A='\xff\xfe'\n# \xe9\n", "no UTF-8"),
        (b"# caf\xe9\nexport A=1\n", "no UTF-8"),
        (b"export A=$(printf '\\351')\n", "no UTF-8"),
        (b"sleep 60\n", "takes more than 5 s"),
        (b"exit 3\n", "bash cannot source it"),
        (b"source /nowhere.sh || exit 1\n", "No such file"),
        (b"if\n", "syntax error"),
    ],
)
def test_what_cannot_be_sourced(tmp_path: Path, content: bytes, problem: str) -> None:
    config = tmp_path / "config_X_1x8x4.sh"
    config.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        source(config)
    assert str(caught.value).startswith(f"{config}: ")
    assert str(caught.value).isprintable()


def test_a_config_sourced_after_another_is_what_it_is_alone() -> None:
    """In one shell: FP8_ACT of the first would change the second's numbers, and the log would name the second."""
    show = "env | grep -vE '^(_|SHLVL|PWD|OLDPWD)=' | sort"
    names = [config.name for config in CONFIGS]
    lines = [f"(source ./{name}; {show}) >alone/{name}" for name in names]
    for first, second in [*zip(names, names[1:] + names[:1], strict=True), *zip(names, names[5:] + names[:5], strict=True)]:
        lines.append(f"(source ./{first}; source ./{second}; {show}) | cmp - alone/{second} || echo '{first} {second}'")
    with tempfile.TemporaryDirectory() as folder:
        for file in ROOT.glob("config_*.sh"):
            shutil.copy(file, folder)
        (Path(folder) / "alone").mkdir()
        done = subprocess.run(
            ["bash", "-c", "\n".join(lines)], cwd=folder, env={"PATH": os.defpath}, capture_output=True, text=True
        )
    assert done.stdout + done.stderr == ""
