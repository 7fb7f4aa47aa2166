"""What surrounds a fit: one seed for all ranks, a quiet garbage collector, and the adapter written afterwards."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.lightning import MegatronStrategy

from llama2_lora.checkpoint import write_adapter
from llama2_lora.llama2 import LlamaShape
from llama2_lora.settings import INT32, Settings
from llama2_lora.training.lora import gather_adapter

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)


def shared_seed(settings: Settings, strategy: MegatronStrategy) -> int:
    """SEED, or a number that rank 0 takes from /dev/urandom (rules §5.1); seeds every generator of this process.

    The ranks agree over the store of the rendezvous, which the strategy then uses for the process group: the seed is
    needed before that exists.
    """
    rank = settings.system.rank
    store, _, _ = next(
        torch.distributed.rendezvous("env://", rank, settings.system.world_size or 1, timeout=RENDEZVOUS_TIMEOUT)
    )
    if rank == 0:
        store.set("seed", str(secrets.randbelow(INT32) if settings.run.seed is None else settings.run.seed))
    strategy.store = store
    return pl.seed_everything(int(store.get("seed")), verbose=False)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No collection inside: one takes tens of milliseconds on one rank, and all others wait for it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def save_adapter(settings: Settings, model: torch.nn.Module, shape: LlamaShape) -> None:
    """Write the whole adapter to RESULTS_PATH/adapter on rank 0, after run_stop. Every rank must call it."""
    tensors = gather_adapter(model)
    if settings.system.rank == 0:
        o = settings.optimization
        write_adapter(Path(settings.run.results_path) / "adapter", tensors, shape, o.lora_rank, o.lora_alpha)
