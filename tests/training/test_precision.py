"""What is quantized: the groups that share a scale, what the log says of it, and the cast that does not saturate."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.environments import VALID
from llama2_lora.config.settings import Settings
from llama2_lora.llama2 import LLAMA2_70B
from llama2_lora.training.built import precisions
from llama2_lora.training.callback import MLPerfCallback, NonFiniteLoss
from llama2_lora.training.cpu import cpu_platform
from llama2_lora.training.warmup import WarmUp


@pytest.fixture
def eight_ranks() -> Iterator[Any]:
    """A pretended group of eight: TP 2, CP 2, so two replicas."""
    with cpu_platform():
        from megatron.core import parallel_state

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        parallel_state.initialize_model_parallel(2, context_parallel_size=2, create_gloo_process_groups=False)
        yield parallel_state
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def test_scales_are_shared_within_a_replica_alone(eight_ranks: Any) -> None:
    """Ranks of one replica hold parts of one tensor; no FP8 tensor crosses replicas, and they may be nodes apart."""
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_context

    from llama2_lora.training import recipe

    settings = Settings.from_env(VALID | {"TP": "2", "CP": "2", "FP8": "1"})
    config = recipe.build_config(settings, LLAMA2_70B)
    config.fp8, config.fp8_recipe = "hybrid", "delayed"  # as the precision plugin sets them
    with patch.object(te, "fp8_autocast") as autocast:
        get_fp8_context(config)
    group = autocast.call_args.kwargs["fp8_group"]
    assert torch.distributed.get_process_group_ranks(group) == [0, 1, 2, 3]


BF16 = dict(
    bf16=True, fp8=None, fp4=None, fp8_dot_product_attention=False, tp_comm_overlap=False, sequence_parallel=False,
    context_parallel_size=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "linear", "attention", "communication"),
    [
        ({}, "bfloat16", "bfloat16", "bfloat16"),
        ({"bf16": False}, "fp32", "fp32", "fp32"),
        ({"fp8": "hybrid"}, "fp8", "bfloat16", "bfloat16"),  # without SP nothing quantized is sent
        ({"fp8": "hybrid", "sequence_parallel": True}, "fp8", "bfloat16", "fp8"),  # TE gathers the norm's output in FP8
        ({"fp8": "hybrid", "sequence_parallel": True, "tp_comm_overlap": True}, "fp8", "bfloat16", "fp8"),
        ({"fp4": "e2m1", "sequence_parallel": True}, "nvfp4", "bfloat16", "nvfp4"),
        ({"fp8": "hybrid", "fp8_dot_product_attention": True}, "fp8", "fp8", "bfloat16"),
        ({"fp8": "hybrid", "fp8_dot_product_attention": True, "context_parallel_size": 2}, "fp8", "fp8", "fp8"),
        ({"fp8": "hybrid", "context_parallel_size": 2}, "fp8", "bfloat16", "bfloat16"),
        ({"sequence_parallel": True, "tp_comm_overlap": True}, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_the_log_names_the_lowest_precision(changes: dict, linear: str, attention: str, communication: str) -> None:
    assert list(precisions(SimpleNamespace(**(BF16 | changes))).values()) == [linear, attention, communication]


def test_fp8_act_saturates_with_this_torch(eight_ranks: Any) -> None:
    """torch 2.13's cast to e4m3 ends at 448. That of torch 2.9, the GPU image's, makes NaN above 464: see the error below."""
    from megatron.core.fusions.fused_bias_swiglu import SwiGLUFunction

    gate_and_up = torch.tensor([[463.0, 1.0], [465.0, 1.0]], requires_grad=True)
    SwiGLUFunction.apply(gate_and_up, True, False).sum().backward()
    assert gate_and_up.grad.tolist() == [[1.0, 448.0], [1.0, 448.0]]


@pytest.mark.parametrize(("fp8_act", "hinted"), [("1", True), ("0", False)])
def test_a_nan_under_fp8_act_names_the_way_out(fp8_act: str, hinted: bool) -> None:
    settings = Settings.from_env(VALID | {"FP8": "1", "FP8_ACT": fp8_act})
    callback = MLPerfCallback(settings, SimpleNamespace(), 1, WarmUp(settings))
    trainer = SimpleNamespace(global_step=10, callback_metrics={"reduced_train_loss": torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteLoss) as caught:
        callback.on_train_batch_end(trainer, None, None, None, 1)
    assert ("FP8_ACT=0" in str(caught.value)) is hinted
