"""Life of an FP8 model, on Transformer Engine's own classes: build, restore, warm-up, steps, evaluation, teardown.

One run on one rank with FP8 weights, watched at every station; what was seen is in a report that the tests read.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers.on_the_clock import watch_compilation
from helpers.training_runs import Tiny, events, free_port, run_worker, train_here

LAYERS = 2


def worker(environment: dict[str, str], file: Path) -> None:
    from llama2_lora.training.cpu import cpu_platform

    report: dict[str, Any] = {"inference_mode": [], "dequantized_peak": 0, "moved": 0}
    watch_compilation(report)
    with cpu_platform():
        import lightning.pytorch.loops.utilities as loops
        import nemo.lightning  # noqa: F401  Megatron's modules in their order
        from megatron.core import fp8_utils
        from megatron.core.dist_checkpointing import utils as checkpointing

        from llama2_lora.training import model, recipe, warmup

    watch_build(report, model)
    watch_restore(report, checkpointing, fp8_utils, recipe)
    watch_warm_up(report, warmup)
    watch_evaluation(report, model)
    watch_teardown(report, model, recipe)
    # Lightning asks for the backend before it chooses the mode of an evaluation: on GPUs it is NCCL.
    with patch.object(loops, "dist", SimpleNamespace(get_backend=lambda: "nccl")):
        train_here(environment)
    file.write_text(json.dumps(report))


def fp8_weights(module: torch.nn.Module) -> dict[str, Any]:
    return {name: p for name, p in module.named_parameters() if type(p).__name__ == "Float8Tensor"}


def watch_build(report: dict[str, Any], model: Any) -> None:
    configure = model.LoraLlama.configure_model

    def watched(self: Any, *arguments: Any) -> None:
        configure(self, *arguments)
        weights = fp8_weights(self.module).values()
        report["weights"] = len(weights)
        report["transposed"] = sum(weight._transpose is not None for weight in weights)
        report["host copies"] = sum(hasattr(weight, "get_high_precision_init_val") for weight in weights)

    model.LoraLlama.configure_model = watched


def watch_restore(report: dict[str, Any], checkpointing: Any, fp8_utils: Any, recipe: Any) -> None:
    """Bytes of the bf16 copies of FP8 weights that live at one time; what the weights are afterwards."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    dequantize = fp8_utils.dequantize_fp8_tensor

    def counted(weight: Any) -> torch.Tensor:
        copy = dequantize(weight)
        alive.add(copy)
        report["dequantized_peak"] = max(report["dequantized_peak"], sum(t.nbytes for t in alive))
        return copy

    fp8_utils.dequantize_fp8_tensor = counted
    restore = recipe.SeededStrategy.selective_restore

    def watched(self: Any) -> None:
        gc.collect()
        restore(self)
        weights = fp8_weights(self.megatron_parallel)
        report["layer_bytes"] = sum(w.nbytes for name, w in weights.items() if ".layers.0." in name)
        report["loaded"] = {name: w.dequantize().abs().max().item() for name, w in weights.items()}
        report["scales"] = sorted({1 / w._scale_inv.item() for w in weights.values()})

    recipe.SeededStrategy.selective_restore = watched


def watch_warm_up(report: dict[str, Any], warmup: Any) -> None:
    warm_up = warmup.warm_up

    def watched(trainer: Any, settings: Any) -> None:
        parallel = trainer.strategy.megatron_parallel
        before = fp8_state(parallel)
        warm_up(trainer, settings)
        after = fp8_state(parallel)
        report["warm-up"] = {"states": len(after), "changed": [k for k, v in after.items() if before.get(k, FRESH[k[1]]) != v]}
        fp8_state_after_step(trainer, report)

    warmup.warm_up = watched


FRESH = {"amax_history": "zeros", "scale": "ones"}


def fp8_state(module: torch.nn.Module) -> dict[tuple[str, str], str]:
    """(module and direction, field) -> digest, of every tensor of Transformer Engine's delayed scaling."""
    found = {}
    for name, part in module.named_modules():
        for direction, state in getattr(part, "fp8_meta", {}).items():
            for field in FRESH:
                if torch.is_tensor(tensor := getattr(state, field, None)):
                    plain = {"zeros": torch.zeros_like(tensor), "ones": torch.ones_like(tensor)}
                    same = [word for word, value in plain.items() if torch.equal(tensor, value)]
                    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                    found[f"{name} {direction}", field] = same[0] if same else digest
    return found


def fp8_state_after_step(trainer: Any, report: dict[str, Any]) -> None:
    """How many states the first real step changes: without it, unchanged states could be ones that never change."""
    model = trainer.strategy.megatron_parallel
    before, step = fp8_state(model), trainer.optimizers[0].step

    def stepped(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        after = fp8_state(model)
        report["changed_by_steps"] = sum(before.get(key) != value for key, value in after.items())
        return result

    trainer.optimizers[0].step = stepped


def watch_evaluation(report: dict[str, Any], model: Any) -> None:
    step = model.LoraLlama.forward

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self.training:
            report["inference_mode"].append(torch.is_inference_mode_enabled())
        return step(self, *arguments, **options)

    model.LoraLlama.forward = watched


def watch_teardown(report: dict[str, Any], model: Any, recipe: Any) -> None:
    teardown = recipe.SeededStrategy.teardown

    def moved(self: Any) -> Any:
        report["moved"] += 1
        return self

    model.LoraLlama.cpu = moved

    def watched(self: Any) -> None:
        before = {name: w._data.clone() for name, w in fp8_weights(self.megatron_parallel).items()}
        teardown(self)
        after = fp8_weights(self.megatron_parallel)
        report["same_after_teardown"] = before.keys() == after.keys() and all(
            torch.equal(data, after[name]._data) for name, data in before.items()
        )

    recipe.SeededStrategy.teardown = watched


@pytest.fixture(scope="module")
def ran(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fp8")
    changes = {"FP8": "1", "FP8_PARAMS": "1", "WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "1"}
    environment = tiny.environment(folder, MASTER_PORT=free_port(), **changes)
    image = {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"}  # what an image may set
    return run_worker(__file__, environment, folder / "report.json", **image)


def test_the_run_is_one_in_fp8(ran: tuple[str, dict[str, Any]]) -> None:
    log, report = ran
    assert report["weights"] == 4 * LAYERS  # qkv, proj, fc1, fc2
    assert events(log, "lowest_numerical_precision_in_linear")[0]["value"] == "fp8"
    assert len(events(log, "train_loss")) == 4


def test_the_build_makes_no_transposes_and_no_host_copies(ran: tuple[str, dict[str, Any]]) -> None:
    assert (ran[1]["transposed"], ran[1]["host copies"]) == (0, 0)


def test_restoring_needs_one_layer_above_the_weights(ran: tuple[str, dict[str, Any]]) -> None:
    report = ran[1]
    assert 0 < report["dequantized_peak"] <= report["layer_bytes"]
    assert len(report["loaded"]) == report["weights"]
    assert all(0.3 < largest < 1 for largest in report["loaded"].values())  # normal with a deviation of 0.15
    assert report["scales"] == [64]


def test_the_warm_up_leaves_fp8s_state_as_it_was(ran: tuple[str, dict[str, Any]]) -> None:
    report = ran[1]
    assert report["warm-up"]["changed"] == []
    assert report["warm-up"]["states"] >= 4 * LAYERS * 2 * 2  # two fields, forward and backward
    assert report["changed_by_steps"] >= 4 * LAYERS


def test_evaluations_run_in_the_mode_of_the_warm_up(ran: tuple[str, dict[str, Any]]) -> None:
    modes = ran[1]["inference_mode"]
    assert len(modes) > 1  # the warm-up's and the run's
    assert not any(modes)


def test_nothing_is_compiled_on_the_clock(ran: tuple[str, dict[str, Any]]) -> None:
    report = ran[1]
    assert report["graphs at run_start"] >= 2  # with gradients and without
    assert report["graphs at run_stop"] == report["graphs at run_start"]


def test_teardown_leaves_the_weights_where_and_what_they_are(ran: tuple[str, dict[str, Any]]) -> None:
    assert ran[1]["moved"] == 0
    assert ran[1]["same_after_teardown"]


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]), Path(sys.argv[2]))
