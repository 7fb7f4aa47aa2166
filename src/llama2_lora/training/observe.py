"""OBSERVE_*: watch a run. All off unless asked for; what a run leaves lies in RESULTS_PATH/observe_SEED.

    OBSERVE_NSYS=100-104        Nsight Systems: run_and_time.sh starts the rank under nsys, which waits for the first step
    OBSERVE_PROFILE=100-104     torch's profiler: trace_RANK.json.gz for chrome://tracing or Perfetto
    OBSERVE_MEMORY=100          allocations up to that step: memory_RANK.pickle for pytorch.org/memory_viz
    OBSERVE_STEP_TIMES=1        step_times.json: each rank's own time; the slowest is named
    OBSERVE_POWER=1             power/TRIAL/node_N.txt: power, clocks, temperature (node/power.py, a process beside the rank)

Files are written after run_stop. Step times cost two CUDA events a step and power nothing; nsys, the profiler and the
allocator's history do slow the steps that they watch.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from llama2_lora.config.settings import Settings
from llama2_lora.judge.observed import StepTimes, folder_of, write
from llama2_lora.node import power
from llama2_lora.training.shared_callback import SharedCallback

MEMORY_EVENTS = 200_000  # of the allocator, the last ones kept


class Observe(SharedCallback):
    """Add it after the log's callback: then its last hook comes after run_stop."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.folder = folder_of(Path(settings.run.results_path), seed)
        o = settings.observe
        self.watchers: list[Watcher] = [Nsys(o.nsys_window), Profiler(o.profile_window, settings), MemoryHistory(o.memory_step)]
        if settings.system.rank not in o.rank_list:
            self.watchers = []
        self.watchers += [OwnTimes(settings)] * o.step_times
        self.watchers += [PowerLog(settings)] * (o.power_seconds > 0 and settings.system.local_rank == 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for watcher in self.watchers:
            watcher.prepare()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        for watcher in self.watchers:
            watcher.before(trainer.global_step + 1, trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for watcher in self.watchers:
            watcher.after(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for watcher in self.watchers:
            watcher.end()
        self.folder.mkdir(parents=True, exist_ok=True)
        for watcher in self.watchers:
            watcher.write(self.folder, self.settings.system.rank)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for watcher in self.watchers:
            watcher.end()


class Watcher:
    """One thing to watch. Every hook is optional; steps count from 1."""

    def prepare(self) -> None:
        """Before run_start."""

    def before(self, step: int, trainer: pl.Trainer) -> None: ...

    def after(self, step: int) -> None: ...

    def end(self) -> None:
        """The run is over, well or not."""

    def write(self, folder: Path, rank: int) -> None:
        """After run_stop of a run that came to its end."""


class Nsys(Watcher):
    """Marks the window for `nsys profile --capture-range=cudaProfilerApi`."""

    def __init__(self, window: range) -> None:
        self.window = window

    def before(self, step: int, trainer: pl.Trainer) -> None:
        if self.window and step == self.window[0]:
            torch.cuda.profiler.start()

    def after(self, step: int) -> None:
        if self.window and step == self.window[-1]:
            torch.cuda.profiler.stop()


class Profiler(Watcher):
    def __init__(self, window: range, settings: Settings) -> None:
        self.window = window
        activities = [torch.profiler.ProfilerActivity.CPU]
        if settings.system.platform == "gpu":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities) if window else None
        self.running = self.done = False

    def before(self, step: int, trainer: pl.Trainer) -> None:
        if self.profile and step == self.window[0]:
            self.profile.start()
            self.running = True

    def after(self, step: int) -> None:
        if self.running and step == self.window[-1]:
            self.end()

    def end(self) -> None:
        if self.profile and self.running:
            self.profile.stop()
            self.running, self.done = False, True

    def write(self, folder: Path, rank: int) -> None:
        if self.profile and self.done:
            self.profile.export_chrome_trace(str(folder / f"trace_{rank}.json.gz"))


class MemoryHistory(Watcher):
    def __init__(self, step: int | None) -> None:
        self.step = step
        self.snapshot: Any = None

    def prepare(self) -> None:
        if self.step:
            # PRIVATE: torch 2.13 torch.cuda.memory._record_memory_history
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def after(self, step: int) -> None:
        if step == self.step:
            self.snapshot = torch.cuda.memory._snapshot()  # PRIVATE: torch 2.13 torch.cuda.memory._snapshot
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, folder: Path, rank: int) -> None:
        if self.snapshot is not None:
            with (folder / f"memory_{rank}.pickle").open("wb") as file:
                pickle.dump(self.snapshot, file)


class OwnTimes(Watcher):
    """From the start of a step to the end of its last backward pass, which is where replicas begin to wait for each other.

    Ranks of one tensor- or context-parallel group wait for each other inside of it, and so have the time of the slowest.
    """

    def __init__(self, settings: Settings) -> None:
        self.gpu = settings.system.platform == "gpu"
        self.marks: list[tuple[Any, Any]] = []
        self.start: Any = None
        self.restore: Callable[[], None] = lambda: None

    def before(self, step: int, trainer: pl.Trainer) -> None:
        if self.start is None:
            self._hook(trainer.strategy.megatron_parallel)
        self.start = self._mark()

    def _hook(self, model: Any) -> None:
        """Megatron calls this function of the config between the last backward pass and the gradients' reduction."""
        config = model[0].config
        original = config.finalize_model_grads_func

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.marks.append((self.start, self._mark()))
            return original(*args, **kwargs)

        config.finalize_model_grads_func = marked
        self.restore = lambda: setattr(config, "finalize_model_grads_func", original)

    def _mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self) -> None:
        self.restore()

    def write(self, folder: Path, rank: int) -> None:
        torch.cuda.synchronize()
        own = [a.elapsed_time(b) / 1e3 if self.gpu else b - a for a, b in self.marks]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (socket.gethostname(), own))
        if rank == 0 and own:
            times = StepTimes([host for host, _ in everyone], [seconds for _, seconds in everyone])
            write(times, folder)
            print(times, flush=True)


class PowerLog(Watcher):
    """One process a node, started before the clock and told to begin at the first step."""

    def __init__(self, settings: Settings) -> None:
        node = settings.system.rank // settings.system.gpus_per_node
        name = settings.run.trial or "run"
        self.file = Path(settings.run.results_path) / "power" / name / f"node_{node}.txt"
        self.seconds = settings.observe.power_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.begun = False

    def prepare(self) -> None:
        command = [sys.executable, power.__file__, str(self.file), str(self.seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def before(self, step: int, trainer: pl.Trainer) -> None:
        if not self.begun and self.process and self.process.stdin:
            self.begun = True
            try:
                self.process.stdin.write(b"start\n")
                self.process.stdin.flush()
            except BrokenPipeError:  # it has said why on stderr; the run goes on
                self.process = None

    def end(self) -> None:
        if self.process and self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
            self.process = None


def callbacks(settings: Settings, seed: int) -> Iterator[Observe]:
    """None where nothing is observed."""
    if settings.observe.anything:
        yield Observe(settings, seed)
