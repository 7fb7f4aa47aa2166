"""Power logs of a run: power/<result>/node_*.txt and sw_*.txt beside it, as mlperf_logging's power dialect has them.

The mean over the measurement times the time to train is the energy, as in mlperf_logging's result_summarizer: the meter runs
longer than the clock that is scored. Its readings are watts at the wall; `conversion_eff` is the supply's efficiency.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llama2_lora.judge.runlog import Event, RunLog, number, read_log
from llama2_lora.node.power import SOURCE as GPUS_ALONE

POWER_KEYS = ("power_measurement_start", "power_measurement_stop", "power_reading", "interconnect_power_est", "conversion_eff")
MOST_POINTS = 300  # of a curve


@dataclass(frozen=True)
class Power:
    """Of one run: mean over its time, all nodes and switches together."""

    mean_watts: float
    nodes: int
    switches: int
    gpus_alone: bool = False  # OBSERVE_POWER: no meter at the wall
    curve: tuple[tuple[float, float], ...] = ()  # milliseconds of the logs' clock, watts of all nodes together


def is_power_log(log: RunLog) -> bool:
    """Whether a file holds readings of a meter and no run; by its folder alone where it holds nothing."""
    keys = {event.key for event in log.events}
    return bool(keys & set(POWER_KEYS)) and not keys & {"run_start", "init_start"}


def in_power_folder(path: Path, root: Path) -> bool:
    inside = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return "power" in inside


def result_of(path: Path) -> Path:
    """The run that a power log belongs to: <folder>/power/result_0/node_0.txt -> <folder>/result_0, without an ending."""
    return path.parent.parent.parent / path.parent.name


def power_of(logs: Iterable[RunLog]) -> Power | None:
    """Of the power logs of one run; None where none of them holds a reading."""
    logs = list(logs)
    nodes, switches, gpus_alone = [], [], False
    for log in logs:
        gpus_alone = gpus_alone or any(event.metadata.get("source") == GPUS_ALONE for event in log.events)
        events = sorted(log.events, key=lambda event: event.time_ms)
        if (watts := _mean_watts(events)) is not None:
            nodes.append(watts)
        elif (watts := _estimated_watts(events)) is not None:
            switches.append(watts)
    found = Power(sum(nodes) + sum(switches), len(nodes), len(switches), gpus_alone, _curve(logs))
    return found if nodes or switches else None


def _curve(logs: list[RunLog]) -> tuple[tuple[float, float], ...]:
    """Each node's last reading, added up whenever one of them has a new one; from when all have one."""
    readings = sorted(
        (event.time_ms, node, watts * _efficiency(log.events))
        for node, log in enumerate(logs)
        for event in log.events
        if event.key == "power_reading" and (watts := number(event.value)) is not None
    )
    nodes, last, found = {node for _, node, _ in readings}, dict[int, float](), list[tuple[float, float]]()
    for time_ms, node, watts in readings:
        last[node] = watts
        if last.keys() == nodes:
            found.append((time_ms, sum(last.values())))
    return tuple(found[:: max(1, len(found) // MOST_POINTS)])


def _mean_watts(events: list[Event]) -> float | None:
    """Each reading stands for the time since the one before; None without a start or two different times."""
    start = next((e.time_ms for e in events if e.key == "power_measurement_start"), None)
    if start is None:
        return None
    stop = next((e.time_ms for e in events if e.key == "power_measurement_stop"), None)
    energy, before = 0.0, start
    for event in events:
        watts = number(event.value)
        if event.key != "power_reading" or watts is None or event.time_ms < start:
            continue
        if stop is not None and event.time_ms > stop:
            break
        energy += watts * (event.time_ms - before)
        before = event.time_ms
    length = (before if stop is None else stop) - start
    return _efficiency(events) * energy / length if length > 0 and energy > 0 else None


def _estimated_watts(events: list[Event]) -> float | None:
    found = next((number(e.value) for e in events if e.key == "interconnect_power_est"), None)
    return None if found is None else _efficiency(events) * found


def _efficiency(events: Iterable[Event]) -> float:
    found = [value for e in events if e.key == "conversion_eff" and (value := number(e.value)) is not None]
    return found[-1] if found else 1.0


def read_power(paths: Iterable[Path]) -> dict[str, Power]:
    """Power by the name of the run's file without its ending, of all power logs."""
    by_result: dict[str, list[RunLog]] = {}
    for path in sorted(paths, key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(p))]):
        by_result.setdefault(str(result_of(path)), []).append(read_log(path))
    found = ((name, power_of(logs)) for name, logs in by_result.items())
    return {name: power for name, power in found if power is not None}
