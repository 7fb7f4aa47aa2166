"""What surrounds a fit: one seed for all ranks, a watch over them, quiet libraries, the adapter written afterwards."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.utils import logging as nemo_logging

from llama2_lora.config.settings import INT32, Settings
from llama2_lora.llama2 import LlamaShape
from llama2_lora.mlperf_log import MLPerfLog
from llama2_lora.training.adapter import gather_adapter
from llama2_lora.training.watch import Watch
from llama2_lora.weights.checkpoint import write_adapter

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)


def quiet_libraries() -> None:
    """Let NeMo, Lightning and Megatron log errors only: what a run has to say is in its MLPerf log."""
    nemo_logging.setLevel(logging.ERROR)
    # pytorch_lightning and lightning_fabric: other packages, whose loggers Lightning 2.4 takes for its own messages
    # ("GPU available: True") once they are imported, as NeMo's dependencies do
    lightning = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    for name in (*lightning, "megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def unset_attention_choices() -> None:
    """Forget NVTE_FLASH_ATTN and friends, which images set: Megatron refuses any that differs from the recipe's backend."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # noqa: TID251  taken away, not read


def rendezvous(settings: Settings) -> torch.distributed.Store:
    """The store at which all ranks meet, before there is a process group. Raises where one does not come."""
    system = settings.system
    meeting = torch.distributed.rendezvous("env://", system.rank, system.world_size or 1, timeout=RENDEZVOUS_TIMEOUT)
    try:
        store, _, _ = next(meeting)
    except torch.distributed.DistNetworkError as error:
        raise RuntimeError(
            f"the ranks cannot meet: {error}; if another program holds the port, set another MASTER_PORT"
        ) from error
    return store


def shared_seed(settings: Settings, store: torch.distributed.Store) -> int:
    """SEED, or a number that rank 0 takes from /dev/urandom (rules §5.1); the same on every rank."""
    if settings.system.rank == 0:
        store.set("seed", str(secrets.randbelow(INT32) if settings.run.seed is None else settings.run.seed))
    return int(store.get("seed"))


def watch(settings: Settings, store: torch.distributed.Store, log: MLPerfLog) -> Watch:
    """A watch that ends this process, and so the run, with the reason on stderr and an aborted log."""
    system = settings.system

    def end(problem: str) -> None:
        last = threading.Timer(10, os._exit, (1,))  # where even the log's stream is stuck; run.sub then writes the run_stop
        last.daemon = True
        last.start()
        print(f"error: {problem}; the run ends", file=sys.stderr, flush=True)
        log.abort()
        os._exit(1)  # the main thread waits in a collective, which nothing interrupts

    return Watch(system.rank, system.world_size or 1, store.clone(), end)  # the store itself is locked while it waits


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No collection inside: one takes tens of milliseconds on one rank, and all others wait for it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class SaveAdapter(pl.Callback):
    """Write the whole adapter to RESULTS_PATH/adapter_SEED after run_stop: add it after the log's callback.

    A callback, since after the fit Lightning has moved the model to the CPU, where NCCL cannot gather it.
    """

    def __init__(self, settings: Settings, shape: LlamaShape, seed: int) -> None:
        self.settings, self.shape = settings, shape
        self.folder = Path(settings.run.results_path) / f"adapter_{seed}"  # trials of a job share RESULTS_PATH, not a seed

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = gather_adapter(trainer.strategy.megatron_parallel)
        if self.settings.system.rank == 0:
            o = self.settings.optimization
            write_adapter(self.folder, tensors, self.shape, o.lora_rank, o.lora_alpha)
