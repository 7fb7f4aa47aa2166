"""A log file -> its `:::MLLOG` events, however the file has suffered, and the official checker's verdict on them.

A line's event is what follows the last `:::MLLOG ` on it, as mlperf_logging reads it: that covers rank prefixes
(`0: :::MLLOG`), progress bars that end in a bare carriage return and CRLF. mlperf_logging's own reader is not used: its
regular expression takes time quadratic in a line's length, and a field that is missing ends it with a KeyError.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.compliance_checker.mlp_parser import ruleset_510

TOKEN = b":::MLLOG "
SYSTEM_TOKEN = b":::SYSJSON "


@dataclass(frozen=True, slots=True)
class Event:
    """One log line. `line` counts from 1, `raw_key` is the key as written: some logs end it with a space."""

    time_ms: float
    key: str
    value: Any
    metadata: dict[str, Any]
    line: int
    raw_key: str
    text: str


@dataclass(frozen=True, slots=True)
class Damage:
    """A `:::MLLOG` line that holds no event. `text` is what stands around the fault."""

    line: int
    text: str
    error: str


@dataclass(frozen=True)
class RunLog:
    """What a file holds, in file order. `system` is NVIDIA's `:::SYSJSON` line, where there is one."""

    path: Path
    events: list[Event]
    damaged: list[Damage]
    system: dict[str, Any]


def read_log(path: Path) -> RunLog:
    """Read a file to its end; nothing in it is fatal. Raises OSError where it cannot be read."""
    log = RunLog(path, [], [], {})
    rows = path.read_bytes().split(b"\n")
    for number, row in enumerate(rows, 1):
        if SYSTEM_TOKEN in row:
            log.system.update(_system(row.rpartition(SYSTEM_TOKEN)[2]))
        if TOKEN not in row:
            continue
        for part in row.split(b"\r"):
            _, found, text = part.rpartition(TOKEN)
            if not found:
                continue
            body = text.decode("utf-8", errors="replace").strip()
            try:
                log.events.append(_event(body, number))
            except (ValueError, TypeError, KeyError) as error:
                reason = "line is cut off" if number == len(rows) else _reason(error)
                log.damaged.append(Damage(number, _excerpt(body, getattr(error, "pos", 0)), reason))
    return log


def _system(text: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        fields, _ = json.JSONDecoder().raw_decode(text.decode("utf-8", errors="replace"))
        if isinstance(fields, dict):
            return fields
    return {}


def _event(body: str, line: int) -> Event:
    fields = json.loads(body)
    metadata = fields["metadata"]
    if not isinstance(metadata, dict):
        raise TypeError("metadata is not an object")
    key, time_ms = str(fields["key"]), float(fields["time_ms"])
    if not 0 <= time_ms < sys.float_info.max:
        raise ValueError(f"time_ms is {time_ms}")
    return Event(time_ms, key.strip(), fields["value"], metadata, line, key, body)


def _excerpt(body: str, position: int, around: int = 40) -> str:
    start, stop = max(0, position - around), position + around
    return ("..." if start else "") + body[start:stop] + ("..." if stop < len(body) else "")


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def compliance_messages(log: RunLog, ruleset: str) -> list[str]:
    """What mlperf_logging's compliance checker objects to; empty: the log complies."""
    lines = [
        ruleset_510.LogLine(TOKEN.decode() + e.text, e.time_ms, e.raw_key, {"value": e.value, "metadata": e.metadata}, e.line)
        for e in log.events
    ]
    checker = mlp_compliance.make_checker("training", ruleset, True, False)
    if log.damaged:
        checker.put_message("Log lines had parsing errors.")
    try:
        with cached_rules(), quiet_mlperf():
            checker.check_loglines(lines, f"training_{ruleset}/common.yaml")
    except Exception as error:  # it evaluates its rules on whatever the log holds, such as 'nan' <= 0.925
        checker.put_message(f"the checker stopped: {error}")
    finally:
        mlp_compliance.enqueued_configs.clear()  # else they are applied to the next log
    return [*checker.overwritable.values(), *checker.not_overwritable]


_rules: dict[str, Any] = {}


class _CachedYAML:
    """Stands in for the yaml module in mlp_compliance, which parses three files of rules again for every log."""

    BaseLoader = yaml.BaseLoader

    @staticmethod
    def load(stream: Any, Loader: Any) -> Any:  # yaml's own argument
        if stream.name not in _rules:
            _rules[stream.name] = yaml.load(stream, Loader=Loader)
        return _rules[stream.name]


@contextlib.contextmanager
def cached_rules() -> Iterator[None]:
    """The compliance checker reads each rule file once: parsing them takes most of its time."""
    original, mlp_compliance.yaml = mlp_compliance.yaml, _CachedYAML
    try:
        yield
    finally:
        mlp_compliance.yaml = original


@contextlib.contextmanager
def quiet_mlperf() -> Iterator[None]:
    """mlperf_logging's checkers report through the root logger; what they find is returned, so nothing is lost."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
