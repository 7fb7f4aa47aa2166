"""What a run ran on, and in which round: from files beside the log, or the log itself."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama2_lora.accelerators import ACCELERATORS
from llama2_lora.judge.run import Run, System

# Submission rounds by the day on which their results were published; logs are some weeks older
ROUNDS = (
    ("v4.0", datetime(2024, 6, 12, tzinfo=UTC)),
    ("v4.1", datetime(2024, 11, 13, tzinfo=UTC)),
    ("v5.0", datetime(2025, 6, 4, tzinfo=UTC)),
    ("v5.1", datetime(2025, 11, 12, tzinfo=UTC)),
)
BEGIN = datetime(2024, 2, 1, tzinfo=UTC)  # the benchmark's first round was prepared then
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
    shape = re.search(r"_(\d+)x(\d+)x\d+", name)
    return System(accelerator_in(name), *(int(shape[1]), int(shape[2])) if shape else ())


def _from_environment(values: dict[str, str]) -> System | None:
    with contextlib.suppress(KeyError, ValueError):
        accelerator = accelerator_in(values.get("ACCELERATOR") or values.get("DGXSYSTEM", ""))
        return System(accelerator, int(values["DGXNNODES"]), int(values["DGXNGPU"]), values.get("DGXSYSTEM", ""))
    return None


def _from_description(fields: dict[str, Any]) -> System | None:
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        accelerator = accelerator_in(str(fields.get("accelerator_model_name", "")))
        counts = (int(str(fields[name]).strip()) for name in ("number_of_nodes", "accelerators_per_node"))
        return System(accelerator, *counts, name=str(fields.get("system_name", "")))
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
    return next((name for name in sorted(ACCELERATORS, key=len, reverse=True) if name in text.upper()), "")


def round_of(run: Run) -> str | None:
    """The submission round that a log was made for, by its date; None before the first, as of clocks that are off."""
    start = run.first("run_start")
    if start is None or start.time_ms / 1e3 < BEGIN.timestamp():
        return None
    return next((name for name, published in ROUNDS if start.time_ms / 1e3 < published.timestamp()), LATER)
