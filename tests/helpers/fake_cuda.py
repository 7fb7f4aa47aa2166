"""The CPU platform as a node of GPUs, so that a GPU's config can be built on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from llama2_lora.training.cpu import cpu_platform, device


@contextmanager
def fake_gpus(capability: tuple[int, int] = device.HOPPER, count: int = 8) -> Iterator[None]:
    with cpu_platform(capability), patch.object(torch.cuda, "device_count", lambda: count):
        yield
