"""Variables that nothing reads are named, libraries' are left alone."""

from __future__ import annotations

import re

import pytest

from helpers import ROOT
from llama2_lora.config.names import LAUNCHER, unknown
from llama2_lora.config.settings import variables

# What run.sub makes for itself: no variable of a user's
MADE_BY_RUN_SUB = {"CONT_MOUNTS", "LAUNCHER", "TREE", "WORKDIR"}


def test_the_page_lists_what_run_sub_reads() -> None:
    """docs/launch.md's table, beside settings and what Slurm reads itself."""
    page = (ROOT / "docs/launch.md").read_text().partition("## Variables of run.sub")[2]
    cells = re.findall(r"^\| (`[^|]+) \|", page, flags=re.M)
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]*)`", "".join(cells)))
    assert listed - variables() - {"SLURM_MPI_TYPE"} == LAUNCHER - MADE_BY_RUN_SUB


def told(*names: str, ours: bool) -> list[str]:
    return [finding.text for finding in unknown(names, ours)]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAX_STEP", "MAX_STEPS"),
        ("FP8_PARAM", "FP8_PARAMS"),
        ("WARMUP_STEPS", "WARMUP_TRAIN_STEPS"),
        ("DATA_DIR", "DATADIR"),
        ("CUDA_GRAPH", "CUDA_GRAPHS"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_misspelt_name_says_what_is_meant(name: str, meant: str, ours: bool) -> None:
    assert told(name, ours=ours) == [f"{name}: nothing reads it; is {meant} meant?"]


@pytest.mark.parametrize("name", ["LRATE", "LORA_TARGETS", "FP8_MARGIN", "DGXNODES"])
def test_a_name_like_a_setting_is_named_in_any_environment(name: str) -> None:
    assert len(told(name, ours=False)) == 1


def test_what_libraries_and_sites_read_is_left_alone() -> None:
    library = ["NVTE_FUSED_ATTN", "OMP_NUM_THREADS", "TP", "NCCL_NVLS_ENABLE", "CUDA_DEVICE_MAX_CONNECTIONS", "DATADIR", "CONT"]
    assert told(*library, ours=True) == []
    assert told(*library, "MY_SITE", "HOME", "PATH", "LOGNAME", "TERM", "DATA", "MODEL_NAME", "LS_COLORS", ours=False) == []


def test_what_a_config_exports_and_nobody_reads() -> None:
    """A site's own name is told; one that looks like a setting's is an error, in a shell a warning."""
    assert told("MY_SITE", ours=True) == ["MY_SITE: nothing reads it"]
    assert [f.level for f in unknown(["MY_SITE", "LRATE"], ours=True)] == ["error", "warning"]
    assert [f.level for f in unknown(["MY_SITE", "LRATE"], ours=False)] == ["warning"]
