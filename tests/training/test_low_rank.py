"""The adapter's product and its dropout: against plain autograd, and as masks."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker
from torch.nn import functional

from llama2_lora.training import dropout
from llama2_lora.training.dropout import AdapterDropout, begin_micro_batch
from llama2_lora.training.low_rank import _Project

S, B, H, R = 16, 2, 64, 4
EPS = 1e-5


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    """Megatron's tracker, and the sizes and ranks of a single process; a test replaces some."""
    initialize_rng_tracker(force_reset=True)
    with (
        patch.multiple(parallel_state, **{f"get_{kind}_parallel_world_size": lambda: 1 for kind in KINDS}),
        patch.multiple(parallel_state, **{f"get_{kind}_parallel_rank": lambda: 0 for kind in KINDS}),
    ):
        yield
    initialize_rng_tracker(force_reset=True)


KINDS = ("data", "context", "tensor_model")


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("masked", ["no", "kept", "drawn"])
def test_projection_and_gradients_are_autograds(normed: bool, masked: str) -> None:
    """In fp64: A dropout(norm(x)) written out, and the product that keeps neither the mask nor the normed input."""
    torch.manual_seed(0)
    x_SBH = (3 * torch.randn(S, B, H, dtype=torch.float64)).requires_grad_()
    a_RH = torch.randn(R, H, dtype=torch.float64, requires_grad=True)
    gain_H = torch.rand(H, dtype=torch.float64) + 0.5 if normed else None
    mask_SBH = torch.rand(S, B, H) > 0.1
    inputs = functional.rms_norm(x_SBH, (H,), gain_H, EPS) if normed else x_SBH
    expected = 2 * ((inputs if masked == "no" else inputs * mask_SBH) @ a_RH.t())
    keep, draw = mask_SBH if masked == "kept" else None, (lambda: mask_SBH) if masked == "drawn" else None
    found = _Project.apply(x_SBH, a_RH, gain_H, EPS, 2.0, keep, draw)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for ours, autograds in zip(
        torch.autograd.grad(found, (x_SBH, a_RH), direction),
        torch.autograd.grad(expected, (x_SBH, a_RH), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, autograds)


def test_bf16_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    x_SBH, a_RH, gain_H = torch.randn(S, B, H), torch.randn(R, H), torch.rand(H) + 0.5
    expected = functional.rms_norm(x_SBH, (H,), gain_H, EPS) @ a_RH.t()
    found = _Project.apply(*(t.bfloat16() for t in (x_SBH, a_RH, gain_H)), EPS, 1.0, None, None)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_nothing_wide_is_kept_for_the_backward() -> None:
    """Besides the input itself, which the frozen layer keeps too: [S, r] and a number a token."""
    x_SBH, a_RH = torch.randn(S, B, H, requires_grad=True), torch.randn(R, H, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _Project.apply(x_SBH, a_RH, torch.ones(H), EPS, 1.0, None, lambda: torch.ones(S, B, H, dtype=torch.bool))
    own = [t for t in kept if t.data_ptr() != x_SBH.data_ptr()]
    assert max(t.numel() for t in own) <= max(S * B * R, R * H)


def masks(**changes: object) -> torch.Tensor:
    options = dict(probability=0.1, seed=1, tokens_sharded=False, features_sharded=False, name="decoder.layers.0.a")
    return AdapterDropout(**(options | changes)).redraw(torch.empty(S, B, H))()


def test_a_mask_is_drawn_again_and_no_two_are_alike() -> None:
    begin_micro_batch()
    first = masks()
    assert torch.equal(first, masks())
    assert 0.85 < first.float().mean() < 0.95
    assert not torch.equal(first[:, 0], first[:, 1])  # rows
    assert len({tuple(token.tolist()) for token in first.flatten(0, 1)}) == S * B
    others = [masks(seed=2), masks(name="decoder.layers.1.a")]
    begin_micro_batch()
    others.append(masks())
    assert not any(torch.equal(first, other) for other in others)


def test_a_restored_tracker_brings_the_mask_back() -> None:
    """What recomputation does: run a layer of an earlier micro-batch again."""
    begin_micro_batch()
    states, first = get_cuda_rng_tracker().get_states(), masks()
    begin_micro_batch()
    get_cuda_rng_tracker().set_states(states)
    assert torch.equal(first, masks())


def test_parts_of_the_ranks_make_up_the_whole() -> None:
    """TP 2 by tokens or by features, and CP 2: chunks 0 and 3, 1 and 2 of a sequence."""
    begin_micro_batch()
    with patch.object(parallel_state, "get_context_parallel_world_size", lambda: 2):
        whole = masks()  # S tokens of a rank: 2 S of the sequence, of which this is rank 0's part
        with patch.object(parallel_state, "get_context_parallel_rank", lambda: 1):
            other = masks()
    with patch.object(dropout.AdapterDropout, "_samples", lambda *_: range(B)):
        single = AdapterDropout(0.1, 1, False, False, name="decoder.layers.0.a").redraw(torch.empty(2 * S, B, H))()
    chunks = single.chunk(4)
    assert torch.equal(whole, torch.cat([chunks[0], chunks[3]]))
    assert torch.equal(other, torch.cat([chunks[1], chunks[2]]))
    for how, dim in (("tokens_sharded", 0), ("features_sharded", 2)):
        with patch.object(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2):
            parts = []
            for rank in range(2):
                with patch.object(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank):
                    parts.append(masks(**{how: True}))
        joined = torch.cat(parts, dim)
        whole = AdapterDropout(0.1, 1, False, False, name="decoder.layers.0.a").redraw(torch.empty(joined.shape))()
        assert torch.equal(joined, whole)


@pytest.mark.parametrize(("sharded", "differ"), [(False, False), (True, True)])
def test_gpu_ranks_differ_where_their_inputs_do(sharded: bool, differ: bool) -> None:
    """A GPU draws its own part only: ranks that hold the same activations must still draw the same mask."""
    drop, found = AdapterDropout(0.1, 1, sharded, False, name="a"), []
    for rank in range(2):
        with patch.object(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank):
            found.append(drop._draw_own_part(0, S, H, torch.device("cpu")))
    assert torch.equal(*found) != differ
