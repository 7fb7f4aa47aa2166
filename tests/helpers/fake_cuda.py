"""The CPU platform as a node of eight H100, so that a GPU's config can be built on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from llama2_lora.training.cpu import cpu_platform


@contextmanager
def fake_h100() -> Iterator[None]:
    with cpu_platform(), patch.object(torch.cuda, "device_count", lambda: 8):
        yield
