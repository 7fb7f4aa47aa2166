"""Restore by layer: what is taken at a time, and the halves of SwiGLU's weight. The whole of it is in test_fp8_life.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

from llama2_lora.training.restore import layers, merge_on_device


def test_weights_come_a_layer_at_a_time_and_are_let_go() -> None:
    state = ShardedObject("x", None, (1,), (0,))
    sharded: dict[str, Any] = {
        "module.embedding.weight": 1,
        "module.decoder.layers.0.fc1.weight": 2,
        "module.decoder.layers.0.fc1._extra_state": state,
        "module.decoder.layers.0.fc2.weight": 3,
        "module.decoder.layers.10.fc1.weight": 4,
        "module.output_layer.weight": 5,
    }
    parts = layers(sharded)
    assert next(parts) == {"module.embedding.weight": 1, "module.output_layer.weight": 5}
    assert next(parts) == {"module.decoder.layers.0.fc1.weight": 2, "module.decoder.layers.0.fc2.weight": 3}
    assert "module.decoder.layers.0.fc1.weight" not in sharded
    assert next(parts) == {"module.decoder.layers.10.fc1.weight": 4}
    assert list(parts) == []
    assert list(sharded) == ["module.decoder.layers.0.fc1._extra_state"]  # FP8's history of another run: not read


def test_halves_on_two_devices_are_joined_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parallel load leaves one half on the host.."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: SimpleNamespace(value=self.item(), device="gpu"))
    joined = []
    factory = ShardedTensorFactory("fc1", torch.zeros(2), lambda *_: [], joined.append)
    merge_on_device(factory)
    factory.merge_fn([torch.tensor(1.0), torch.tensor(2.0)])
    assert [(half.value, half.device) for half in joined[0]] == [(1.0, "gpu"), (2.0, "gpu")]
