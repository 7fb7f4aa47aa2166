"""What a run ran on, and in which round: from files beside the log, or the log itself."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llama2_lora.gpus import ACCELERATORS
from llama2_lora.judge.run import Run, System

# Submission rounds by the day on which their results were published; logs are some weeks older
ROUNDS = (
    ("v4.0", datetime(2024, 6, 12, tzinfo=timezone.utc)),
    ("v4.1", datetime(2024, 11, 13, tzinfo=timezone.utc)),
    ("v5.0", datetime(2025, 6, 4, tzinfo=timezone.utc)),
    ("v5.1", datetime(2025, 11, 12, tzinfo=timezone.utc)),
)
BEGIN = datetime(2024, 2, 1, tzinfo=timezone.utc)  # the benchmark's first round was prepared then
TRAY = 4  # GPUs of a node in an NVL72 rack
LATER = "v6.0 or later"


def find_system(run: Run) -> System:
    """run.sub's .env beside the log, else SYSJSON, systems/NAME.json or the config's name."""
    if found := _from_environment(job_environment(run.path)):
        return found
    folder = run.path.absolute().parent.parent  # <tree>/results/<system>, of .../<system>/llama2_70b_lora/result_0.txt
    described = _description(folder.parent.parent / "systems" / f"{folder.name}.json")
    for fields in (described, run.log.system):
        if found := _from_description(fields):
            return found
    name = str(run.values.get("config_filename", ""))
    if shape := re.search(r"_(\d+)x(\d+)x\d+", name):
        return System(accelerator_in(name), int(shape[1]), int(shape[2]))
    return _from_platform(str(run.values.get("submission_platform", "")))


def _from_platform(name: str) -> System:
    """The two ways in which platforms say their size: 4xXE9712x4GB200, and 2xNVIDIA GB200, whose nodes are trays of four."""
    accelerator = accelerator_in(name)
    if shape := re.match(r"(\d+)x.*x(\d+)" + re.escape(accelerator or "?"), name):
        return System(accelerator, int(shape[1]), int(shape[2]))
    nodes = re.match(r"(\d+)x", name)
    return System(accelerator, int(nodes[1]), TRAY) if nodes and accelerator in ("GB200", "GB300") else System(accelerator)


def _from_environment(values: dict[str, str]) -> System | None:
    with contextlib.suppress(KeyError, ValueError):
        accelerator = accelerator_in(values.get("ACCELERATOR") or values.get("DGXSYSTEM", ""))
        return System(accelerator, int(values["DGXNNODES"]), int(values["DGXNGPU"]), values.get("DGXSYSTEM", ""))
    return None


def _from_description(fields: dict[str, Any]) -> System | None:
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        accelerator = accelerator_in(str(fields.get("accelerator_model_name", "")))
        nodes, per_node = (int(str(fields[name]).strip()) for name in ("number_of_nodes", "accelerators_per_node"))
        return System(accelerator, nodes, per_node, str(fields.get("system_name", "")))
    return None


@functools.lru_cache(maxsize=64)
def _description(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        fields = json.loads(file.read_text(encoding="utf-8-sig", errors="replace"))
        return fields if isinstance(fields, dict) else {}
    return {}


def job_environment(log: Path) -> dict[str, str]:
    """What run.sub noted of the job beside the log; empty without that file."""
    file = log.with_suffix(".env")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return dict(line.split("=", 1) for line in lines if "=" in line)


def accelerator_in(text: str) -> str:
    """The longest name of a known part in a text; empty where there is none."""
    text = text.upper().replace("H200 NVL", "H200-NVL")
    return next((name for name in sorted(ACCELERATORS, key=len, reverse=True) if name in text), "")


def round_of(run: Run) -> str | None:
    """The submission round that a log was made for, by its date; None before the first, as of clocks that are off."""
    start = run.first("run_start")
    if start is None or start.time_ms / 1e3 < BEGIN.timestamp():
        return None
    return next((name for name, published in ROUNDS if start.time_ms / 1e3 < published.timestamp()), LATER)
