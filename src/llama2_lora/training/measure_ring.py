"""Context parallelism's ring, on one rank alone: what it receives is what it sends.

torch's fake process group copies in its collectives, but a receive leaves the buffer as it was. In Transformer Engine's ring
that is memory of somebody else, and in FP8 one byte in 128 of it is no number: losses become NaN, and products of NaN draw less
power than a run's. So the one function that passes keys, values and their gradients on copies them instead.

Transformer Engine 2.9. Of another version, whose function is not the one that was read, nothing is replaced; the measurement
then says that values are not finite, if they are not.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MODULE, NAME = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel", "flash_attn_p2p_communicate"
SOURCE = "a0313c79e7bffd9ce38a895aa060cec243bbe8f9c913a24c7863ed76d9d2baa8"  # of 2.9.0


class Done:
    """A request that has been served."""

    def wait(self) -> None: ...


def echo(rank: int, send: Any, send_dst: int, recv: Any, recv_src: int, group: Any, batch: bool) -> list[Done]:
    recv.copy_(send)
    return [Done()]


@contextmanager
def echoing_ring() -> Iterator[None]:
    module = importlib.import_module(MODULE)
    original = getattr(module, NAME, None)
    if original is None or source_hash(original) != SOURCE:
        yield
        return
    setattr(module, NAME, echo)
    try:
        yield
    finally:
        setattr(module, NAME, original)


def source_hash(function: Any) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
