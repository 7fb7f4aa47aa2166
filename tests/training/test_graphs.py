"""Steps and evaluations that CUDA graphs replay are those of the same run without a replay: losses, gradients, dropout masks.

A launched copy of this file trains. Graphs are recorded and replayed by the CPU's stand-in (training/cpu/graphs.py) under the
libraries' own capture: Megatron's graphs of layers and of an iteration, with Transformer Engine's FP8 state. Against a run
without any of it, and so without dropout, whose masks differ: test_performance.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from helpers import many_runs
from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny

TOLERANCE = 1e-6
STEPS, HEAL, LAYERS = 8, 4, 2
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "32", "EVAL_SKIP": "0"}
SHORT |= {"WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "2"}
ONE_RANK = {
    "fp32": {},
    "fp8": {"FP8": "1", "FP8_DPA": "1"},
    "fp8_weights": {"FP8": "1", "FP8_PARAMS": "1", "FP8_AMAX_ALGO": "max"},
    # Megatron makes a layer's graphs by running it, and what is made in the run draws masks of its own.
    "unhealed": {"FP4": "1", "LORA_DROPOUT": "0"},
    "healed": {"FP4": "1", "FP4_HEAL_STEP": str(HEAL), "LORA_DROPOUT": "0"},
}
TWO_RANKS = {
    "tp": {"TP": "2", "SP": "1", "FP8": "1"},
    "cp": {"CP": "2"},
    "val_cp": {"CP": "2", "VAL_CP": "1"},
    "dp": {"MINIBS": "4"},
}
KINDS = ("layer", "iteration")


def worker(folder: Path, environments: dict[str, dict[str, str]]) -> None:
    calls = watch_replays()
    for name, environment in environments.items():
        calls.clear()
        with never_replayed() if name.startswith("eager") else nullcontext():
            many_runs.worker(folder, {name: environment})
        (folder / name / "calls.json").write_text(json.dumps(calls))


def watch_replays() -> list[str]:
    """Replays, copies to where a graph reads its batch, and the waits of the stream that copies, in order."""
    from llama2_lora.training.cpu import cpu_platform, device
    from llama2_lora.training.cpu import graphs as stand_in

    with cpu_platform():
        from megatron.core import full_cuda_graph

    calls: list[str] = []

    def watched(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(what)
            return function(*arguments, **options)

        setattr(owner, name, call)

    watched(stand_in.CUDAGraph, "replay", "replay")
    watched(full_cuda_graph, "clone_tensors_in_struct", "copy")
    watched(device.Stream, "wait_stream", "wait")
    return calls


@contextmanager
def never_replayed() -> Iterator[None]:
    """The same settings, and so the same masks, but Python runs every step."""
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    def call(self: Any, **options: Any) -> Any:
        return self.forward_backward_func(**options)

    with patch.object(FullCudaGraphWrapper, "__call__", call):
        yield


def variants(cases: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    runs = {f"eager {name}": settings | {"CUDA_GRAPHS": "iteration"} for name, settings in cases.items()}
    return runs | {f"{kind} {name}": settings | {"CUDA_GRAPHS": kind} for kind in KINDS for name, settings in cases.items()}


@pytest.fixture(scope="module")
def one_rank(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_many(tiny, tmp_path_factory.mktemp("one"), variants(ONE_RANK), 1, __file__, **SHORT)


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_many(tiny, tmp_path_factory.mktemp("two"), variants(TWO_RANKS), 2, __file__, **SHORT)


def assert_same(run: Done, other: Done, ranks: int = 1) -> None:
    losses, expected = run.losses(), other.losses()
    assert len(expected["train_loss"]) == STEPS
    assert len(expected["eval_accuracy"]) == 2
    for key in expected:
        assert losses[key] == pytest.approx(expected[key], abs=TOLERANCE)
    for rank in range(ranks):
        gradients, wanted = run.gradients(rank), other.gradients(rank)
        assert gradients.keys() == wanted.keys()
        for name in wanted:
            assert np.abs(gradients[name] - wanted[name]).max() < TOLERANCE, name


@pytest.mark.parametrize("case", ONE_RANK)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_is_the_step(kind: str, case: str, one_rank: dict[str, Done]) -> None:
    """With dropout: a mask that a replay repeated would show, and so would one in an evaluation."""
    assert_same(one_rank[f"{kind} {case}"], one_rank[f"eager {case}"])


@pytest.mark.parametrize("case", TWO_RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_is_the_step_on_two_ranks(kind: str, case: str, two_ranks: dict[str, Done]) -> None:
    assert_same(two_ranks[f"{kind} {case}"], two_ranks[f"eager {case}"], ranks=2)


def test_the_compared_runs_differ(one_rank: dict[str, Done]) -> None:
    """Without this the comparisons could be of runs that do nothing."""
    losses = {name: one_rank[f"eager {name}"].losses()["train_loss"] for name in ONE_RANK}
    assert losses["fp8"] != losses["fp32"]
    assert losses["healed"][:HEAL] == losses["unhealed"][:HEAL]
    assert all(one != other for one, other in zip(losses["healed"][HEAL:], losses["unhealed"][HEAL:], strict=True))


@pytest.mark.parametrize("case", ONE_RANK)
def test_graphs_are_replayed(case: str, one_rank: dict[str, Done]) -> None:
    """But for the step that makes them: an iteration's once a step, a layer's forward and backward."""
    replays = {kind: calls(one_rank[f"{kind} {case}"]).count("replay") for kind in ("eager", *KINDS)}
    assert replays["eager"] == 0
    assert replays["iteration"] >= STEPS - 1
    assert replays["layer"] >= 2 * LAYERS * (STEPS - 1)


def test_a_batch_is_copied_after_the_replay_that_reads_the_one_before(one_rank: dict[str, Done]) -> None:
    found = calls(one_rank["iteration fp32"])
    copies = [number for number, call in enumerate(found) if call == "copy"]
    assert len(copies) >= STEPS
    for number in copies:
        assert "wait" in found[last_replay(found, number) : number]


def calls(run: Done) -> list[str]:
    return json.loads((run.folder / "calls.json").read_text())


def last_replay(found: list[str], before: int) -> int:
    return max((number for number in range(before) if found[number] == "replay"), default=0)


# ---- The stand-in ----------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[None]:
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        yield


def captured(work: Callable[[], Any], *states: Any) -> Any:
    recorded = torch.cuda.CUDAGraph()
    for state in states:
        recorded.register_generator_state(state)
    with torch.cuda.graph(recorded):
        work()
    return recorded


def test_a_capture_computes_nothing(device: None) -> None:
    total, made = torch.zeros(3), []
    recorded = captured(lambda: made.append(total.add_(torch.ones(3) * 2) + 1))
    assert total.tolist() == [0, 0, 0]
    assert made[0].isnan().all()
    recorded.replay()
    recorded.replay()
    assert total.tolist() == [4, 4, 4]
    assert made[0].tolist() == [5, 5, 5]


def test_a_replay_repeats_numbers_and_reads_tensors(device: None) -> None:
    number, tensor, out = 2, torch.ones(1), torch.zeros(1)
    recorded = captured(lambda: out.copy_(tensor * number))
    number = 3
    tensor.fill_(5)
    recorded.replay()
    assert out.item() == 10


def test_a_replay_needs_what_the_capture_read(device: None) -> None:
    read, out = [torch.ones(4)], torch.zeros(4)
    recorded = captured(lambda: out.copy_(read[0] * 2))
    recorded.replay()
    read.clear()
    with pytest.raises(RuntimeError, match="freed"):
        recorded.replay()


def test_a_replay_runs_a_backward_pass(device: None) -> None:
    weight, x = torch.nn.Parameter(torch.tensor([2.0, 3.0])), torch.ones(2)
    gradient = torch.zeros(2)
    recorded = captured(lambda: gradient.add_(torch.autograd.grad((weight * x).square().sum(), weight)[0]))
    x.fill_(2)
    recorded.replay()
    assert gradient.tolist() == [16, 24]


@pytest.mark.parametrize(
    "work",
    [lambda x: x.sum().item(), lambda x: bool(x[0]), lambda x: x[x > 0], lambda x: x.pin_memory(), lambda x: torch.equal(x, x)],
)
def test_what_cuda_refuses_in_a_capture(work: Callable[[torch.Tensor], Any], device: None) -> None:
    with pytest.raises(RuntimeError, match="captured"):
        captured(lambda: work(torch.ones(3)))
    assert not torch.cuda.is_current_stream_capturing()


def test_every_replay_draws_what_the_step_would(device: None) -> None:
    """From the device's generator, and from one that the graph was told of."""
    generator = torch.cuda.default_generators[0]
    own, masks = generator.clone_state().manual_seed(7), torch.zeros(2, 64)

    def draw() -> None:
        masks[0].bernoulli_(0.5)
        before = generator.graphsafe_get_state()
        generator.graphsafe_set_state(own)
        masks[1].bernoulli_(0.5)
        generator.graphsafe_set_state(before)

    def start() -> None:
        torch.manual_seed(1)
        own.manual_seed(7)

    def drawn(step: Callable[[], None]) -> list[list[float]]:
        step()
        return masks.tolist()

    start()
    wanted = [drawn(draw) for _ in range(3)]
    start()
    recorded = captured(draw, own, generator.graphsafe_get_state())
    assert [drawn(recorded.replay) for _ in range(3)] == wanted
    assert wanted[0] != wanted[1] != wanted[2]
    with pytest.raises(RuntimeError, match="register_generator_state"):
        captured(draw)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
