"""A log file -> its `:::MLLOG` events, however the file has suffered, in memory that does not grow with its noise.

A line's event is what follows the last `:::MLLOG ` on it, as mlperf_logging reads it: that covers rank prefixes
(`0: :::MLLOG`), progress bars that end in a bare carriage return and CRLF. mlperf_logging's own reader is not used: its
regular expression takes time quadratic in a line's length, and a field that is missing ends it with a KeyError.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = b":::MLLOG "
SYSTEM_TOKEN = b":::SYSJSON "
CHUNK_BYTES = 1 << 20
MOST_LINE_BYTES = 4 << 20  # of a line without an end; only what follows its last token is kept
MOST_PER_KEY = 50_000  # events of one key that are kept; a run has some hundred
MOST_DAMAGED = 1_000
TRAIN_LOSS_KEYS = ("train_loss", "reduced_train_loss")
STARTS_OF_MANY_NODES = ("cache_clear", "init_start")  # every node writes its own, so their times are not in file order
MOST_SEQUENCES = 10**9  # a count above this is damage


@dataclass(frozen=True, slots=True)
class Event:
    """One log line. `line` counts from 1, `raw_key` is the key as written: some logs end it with a space."""

    time_ms: float
    key: str
    value: Any
    metadata: dict[str, Any]
    line: int
    raw_key: str


@dataclass(frozen=True, slots=True)
class Damage:
    """A `:::MLLOG` line that holds no event. `text` is what stands around the fault."""

    line: int
    text: str
    error: str


@dataclass
class TrainLosses:
    """The training losses of a log in columns: a long log has a million. Sequences are NaN where the line does not say."""

    times_ms: array[float] = field(default_factory=lambda: array("d"))
    sequences: array[float] = field(default_factory=lambda: array("d"))
    losses: array[float] = field(default_factory=lambda: array("d"))
    first: Event | None = None

    def add(self, event: Event, loss: float) -> None:
        self.first = self.first or event
        self.times_ms.append(event.time_ms)
        count = samples_count(event)
        self.sequences.append(math.nan if count is None else count)
        self.losses.append(loss)


@dataclass
class RunLog:
    """What a file holds, in file order. `system` is NVIDIA's `:::SYSJSON` line, where there is one."""

    path: Path
    events: list[Event] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    damaged_count: int = 0
    system: dict[str, Any] = field(default_factory=dict)
    train_losses: TrainLosses = field(default_factory=TrainLosses)
    backward: list[Event] = field(default_factory=list)  # the first events that are earlier than the one before them
    backward_count: int = 0
    spaced: Counter[str] = field(default_factory=Counter)  # keys with a space at the end
    first_spaced_line: int = 0
    mllog_lines: int = 0
    last_time_ms: float = 0.0

    _kept: Counter[str] = field(default_factory=Counter)
    _previous: Event | None = None

    def add(self, event: Event) -> None:
        self._note_order(event)
        if event.raw_key != event.key:
            self.first_spaced_line = self.first_spaced_line or event.line
            self.spaced[event.raw_key] += 1
        loss = _train_loss(event)
        if loss is not None:
            self.train_losses.add(event, loss)
        elif event.key == "tracked_stats":
            return  # times and rates that the blocks give too
        elif self._kept[event.key] < MOST_PER_KEY:
            self._kept[event.key] += 1
            self.events.append(event)

    def _note_order(self, event: Event) -> None:
        self.last_time_ms = event.time_ms
        if event.key in STARTS_OF_MANY_NODES:
            return
        if self._previous is not None and event.time_ms < self._previous.time_ms:
            self.backward_count += 1
            if not self.backward:
                self.backward.append(event)
        self._previous = event


def _train_loss(event: Event) -> float | None:
    """The training loss that an event carries: its value, or inside tracked_stats (v5.1); NaN where it is none."""
    value = event.value
    if event.key == "tracked_stats":
        if not isinstance(value, dict):
            return None
        value = next((value[key] for key in TRAIN_LOSS_KEYS if key in value), None)
        if value is None:
            return None
    elif event.key not in TRAIN_LOSS_KEYS:
        return None
    known = number(value)
    return math.nan if known is None else known


def read_log(path: Path) -> RunLog:
    """Read a file to its end; nothing in it is fatal. Raises OSError where it cannot be read."""
    log = RunLog(path)
    for line, row, complete in _rows(path):
        if SYSTEM_TOKEN in row:
            log.system.update(_system(row.rpartition(SYSTEM_TOKEN)[2]))
        if TOKEN not in row:
            continue
        log.mllog_lines += 1
        for part in row.split(b"\r"):
            _, found, text = part.rpartition(TOKEN)
            if not found:
                continue
            body = text.decode("utf-8", errors="replace").strip()
            try:
                log.add(_event(body, line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                reason = _reason(error) if complete else "line is cut off"
                log.damaged_count += 1
                if len(log.damaged) < MOST_DAMAGED:
                    log.damaged.append(Damage(line, _excerpt(body, getattr(error, "pos", 0)), reason))
    return log


def _rows(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line, whether it has an end); most lines without any token are passed over."""
    line, rest = 1, b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            data = rest + chunk if rest else chunk
            body, end, rest = data.rpartition(b"\n")
            if not end:
                if len(data) < MOST_LINE_BYTES:
                    rest = data
                    continue
                body, end, rest = data.rpartition(b"\r")  # a progress bar
                if end:
                    yield line, body, True
                else:
                    rest = _shortened(data)
                continue
            if TOKEN not in body and SYSTEM_TOKEN not in body:
                line += body.count(b"\n") + 1
                continue
            for row in body.split(b"\n"):
                yield line, row, True
                line += 1
    if rest:
        yield line, rest, False


def _shortened(rest: bytes) -> bytes:
    """The end of a line that is no log line: it is longer than any."""
    return rest[-CHUNK_BYTES:]


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
    name = sys.intern(key.strip())
    return Event(time_ms, name, fields["value"], metadata, line, name if key == name else key)


def _excerpt(body: str, position: int, around: int = 40) -> str:
    start, stop = max(0, position - around), position + around
    return ("..." if start else "") + body[start:stop] + ("..." if stop < len(body) else "")


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def samples_count(event: Event) -> int | None:
    """Training sequences that an event names in its metadata; None where it names none, or damage."""
    count = number(event.metadata.get("samples_count"))
    return int(count) if count is not None and 0 <= count < MOST_SEQUENCES else None


def number(value: Any) -> float | None:
    """A finite number, else None: logs of runs that diverged hold NaN."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < sys.float_info.max
    return float(value) if known else None
