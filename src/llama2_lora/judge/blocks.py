"""When a run trained, and how many sequences: the blocks between evaluations, in every dialect.

Where a block begins and ends is what block_start and block_stop say, less any evaluation between them. How far it got is what
the evaluation after it (or run_stop) says, and it began where the last one ended: block_start's own samples_count is the
sequences so far in some logs (v4.0 to v5.0) and the length of the block in others (v5.1), block_stop's either of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llama2_lora.judge.runlog import Event, samples_count

TELLING = ("eval_start", "eval_accuracy", "eval_stop", "run_stop")  # their samples_count is the sequences so far


@dataclass(frozen=True)
class Block:
    """Training between two evaluations. Seconds; `end` since run_start."""

    end: float
    seconds: float
    sequences: int


class _Clock:
    """Walks through a log's events and stops the time that is spent training."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.origin_ms = 0.0
        self.since_ms: float | None = None  # training, since then
        self.resume = False  # an evaluation interrupts an open block
        self.trained_ms = self.end_ms = 0.0  # since the last finished block
        self.position = 0  # sequences so far
        self.opened: Event | None = None
        self.blocks: list[Block] = []

    def see(self, event: Event) -> None:
        key = event.key
        if key == "run_start" and not self.origin_ms:
            self.origin_ms = event.time_ms
        elif key == f"{self.kind}_start":
            self._stop(event)
            self.since_ms, self.opened = event.time_ms, self.opened or event
        elif key in ("eval_start", "run_stop"):
            self.resume = self._stop(event)
        elif key == "eval_stop" and self.resume:
            self.since_ms, self.resume = event.time_ms, False
        elif key == f"{self.kind}_stop":
            self._stop(event)
            self.resume = False
        if key in TELLING and (count := samples_count(event)) is not None:
            self.reached(count)

    def _stop(self, event: Event) -> bool:
        running = self.since_ms is not None
        if self.since_ms is not None:
            self.trained_ms += max(0.0, event.time_ms - self.since_ms)
            self.end_ms, self.since_ms = event.time_ms, None
        return running

    def reached(self, count: int) -> None:
        if count > self.position and self.trained_ms > 0:
            end, seconds = (self.end_ms - self.origin_ms) / 1e3, self.trained_ms / 1e3
            self.blocks.append(Block(end, seconds, count - self.position))
            self.trained_ms, self.opened = 0.0, None
        self.position = max(self.position, count)


def training_blocks(events: Iterable[Event], gbs: int | None) -> list[Block]:
    """The blocks of one log, in order. A last one that no evaluation follows counts where its own lines tell its length."""
    events = list(events)
    clock = _Clock("block" if any(event.key == "block_start" for event in events) else "epoch")
    last_stop: Event | None = None
    for event in events:
        clock.see(event)
        last_stop = event if event.key == f"{clock.kind}_stop" else last_stop
        if event.key == "run_stop":
            break  # a second run in the file is not this one
    if clock.opened and last_stop and last_stop.line > clock.opened.line:
        clock.reached(_end_of_last(clock.opened, last_stop, clock.position, gbs))
    return clock.blocks


def _end_of_last(opened: Event, closed: Event, position: int, gbs: int | None) -> int:
    step, count = closed.metadata.get("step"), samples_count(closed) or 0
    if type(step) is int and gbs and step * gbs > position:
        return step * gbs
    if samples_count(opened) in (position, None):  # block_start says how far training had got, block_stop how far it is now
        return count
    return position + count
