"""A frozen rank ends the run: without it, the others would wait in a collective until the job's time limit.

Every rank has a thread that beats: each few seconds it writes how many steps its rank has finished, and the line that the
main thread is at, into the store at which the ranks met. Rank 0 reads all beats, rank 1 reads rank 0's. Two things end the run:

    silent    a rank stopped beating: its process is stopped, or its node is gone
    stalled   all beat and no step ends: some rank waits for what never comes; the lines show which one is elsewhere

Nothing here is on the clock's path: the training loop counts an integer up and waits for nobody.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from llama2_lora.training.shared_callback import SharedCallback

BEAT_SECONDS = 5
SILENT_SECONDS = 120  # longer than reading one file of a checkpoint, which may hold Python's lock, from a slow disk
STALLED_SECONDS = 600  # the longest step and the longest evaluation take less than a minute
LAST_BEAT_SECONDS = 10  # a beat takes milliseconds, unless the rank that keeps the store has just ended
FIRST_BEAT_SECONDS = 300  # ranks that still import


class Watch(SharedCallback):
    """A context around the fit and one of its callbacks. `end` is called, in the thread, with what is wrong."""

    def __init__(self, rank: int, ranks: int, store: torch.distributed.Store, end: Callable[[str], None]) -> None:
        self.rank, self.store, self.end = rank, store, end
        self.watched = range(ranks) if rank == 0 else range(1) if rank == 1 else range(0)
        self.finished = self.finished_before = 0  # steps and evaluations of this rank: now, and at the beat before
        self.running = False  # init has its own limit, and no steps
        self.main_thread = threading.get_ident()
        self.beats: dict[int, str] = {}
        self.missed = defaultdict[int, int](int)  # beats in a row that did not come, by rank; counted, since a clock jumps
        self.idle = 0  # beats in a row without a finished step
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        # A thread that is inside the store when the interpreter ends aborts the process ("terminate called without an active
        # exception", Python 3.11), and a run that has succeeded would have failed.
        self.thread.join(LAST_BEAT_SECONDS)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.running = True

    def on_train_batch_end(self, *_: Any) -> None:
        self.finished += 1

    def on_validation_end(self, *_: Any) -> None:
        self.finished += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.running = False  # saving the adapter may take as long as it likes

    def _run(self) -> None:
        while True:
            try:
                self.store.set(f"beat/{self.rank}", f"{time.monotonic_ns()}|{self.finished}|{self._line()}")
                if problem := self._silent() or self._stalled():
                    self.end(problem)
                    return
            except torch.distributed.DistNetworkError:
                return  # whoever keeps the store has ended, and with it the run: the collectives and the launcher say why
            except Exception as error:  # a beat that fails once must not make this rank look frozen
                print(f"rank {self.rank}: a beat failed ({error}); trying again", file=sys.stderr, flush=True)
            if self.stopped.wait(BEAT_SECONDS):
                return

    def _silent(self) -> str | None:
        """Who has not beaten for too long, after reading the beats of the ranks that this one watches."""
        if not self.watched:
            return None
        keys = [f"beat/{rank}" for rank in self.watched]
        try:
            self.store.wait(keys, timedelta(seconds=SILENT_SECONDS if self.beats else FIRST_BEAT_SECONDS))
        except torch.distributed.DistStoreError:
            return f"rank 0, which keeps the ranks' store, or a rank that has never come, is silent for {SILENT_SECONDS} s"
        for rank, beat in zip(self.watched, self.store.multi_get(keys), strict=True):
            text = beat.decode()
            self.missed[rank] = self.missed[rank] + 1 if self.beats.get(rank) == text else 0
            self.beats[rank] = text
        silent = [str(rank) for rank in self.watched if self.missed[rank] * BEAT_SECONDS >= SILENT_SECONDS]
        if not silent:
            return None
        return f"rank {', '.join(silent)} has been frozen for {SILENT_SECONDS} s: its process is stopped or its node is gone"

    def _stalled(self) -> str | None:
        """Where the ranks stand, if no step has ended for too long."""
        self.idle = self.idle + 1 if self.running and self.finished == self.finished_before else 0
        self.finished_before = self.finished
        if self.rank != 0 or self.idle * BEAT_SECONDS < STALLED_SECONDS:
            return None
        ranks_at = defaultdict(list)
        for rank, beat in self.beats.items():
            ranks_at[beat.split("|", 1)[1]].append(rank)
        places = sorted(ranks_at.items(), key=lambda place: len(place[1]))  # the odd one out first
        lines = [f"rank {_shortened(ranks)} after {place.replace('|', ' steps at ')}" for place, ranks in places]
        return f"no step has ended for {STALLED_SECONDS} s: " + "; ".join(lines)

    def _line(self) -> str:
        """file:line function that the main thread is in."""
        frame = sys._current_frames().get(self.main_thread)
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "no line"


def _shortened(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
