"""What OBSERVE_STEP_TIMES leaves beside a run: every rank's own time of every step, without its waits for other replicas."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

NAME = "step_times.json"


@dataclass(frozen=True)
class StepTimes:
    """Of one run: host and seconds of each step, by rank."""

    hosts: list[str]
    seconds: list[list[float]]

    @property
    def slowest(self) -> int:
        """The rank whose median step is the longest."""
        medians = [median(steps) for steps in self.seconds]
        return medians.index(max(medians))

    def __str__(self) -> str:
        medians = [median(steps) for steps in self.seconds]
        slowest, usual = self.slowest, median(medians)
        excess = medians[slowest] / usual - 1 if usual else 0.0
        rank = f"slowest rank {slowest} on {self.hosts[slowest]}: {medians[slowest]:.4g} s a step of its own"
        return f"{rank}, {excess:.1%} above the median of {len(medians)} ranks"


def folder_of(results: Path, seed: object) -> Path:
    """Where a run's observations lie: trials of a job share RESULTS_PATH, not a seed."""
    return results / f"observe_{seed}"


def write(times: StepTimes, folder: Path) -> None:
    (folder / NAME).write_text(json.dumps(asdict(times)) + "\n")


def read(folder: Path) -> StepTimes | None:
    """None where there is no such file, or no whole one."""
    try:
        found = StepTimes(**json.loads((folder / NAME).read_text()))
        return found if found.seconds and all(found.seconds) and len(found.hosts) == len(found.seconds) else None
    except (OSError, ValueError, TypeError):
        return None
