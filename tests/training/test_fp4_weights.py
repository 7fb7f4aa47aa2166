"""FP4_PARAMS: frozen weights that are NVFP4 and nothing else train as bf16 weights with NVFP4 copies do, and can leave FP4."""

from __future__ import annotations

import pytest
import torch

from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny, events
from llama2_lora.training.cpu import cpu_platform

STEPS, HEAL = 8, 4
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "32", "EVAL_SKIP": "0", "FP4": "1"}
RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise")
SWITCHED = ("delayed", "mxfp8")  # whose copies differ most: one scale and one copy, many scales and two


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    kept = {"FP4_PARAMS": "1", "FP4_HEAL_STEP": str(HEAL)}
    changes = {"copies": {}, "weights": {"FP4_PARAMS": "1"}, "healed copies": {"FP4_HEAL_STEP": str(HEAL)}}
    changes |= {recipe: kept | {"FP8_RECIPE": recipe} for recipe in SWITCHED}
    return run_many(tiny, tmp_path_factory.mktemp("fp4"), changes, 1, **SHORT)


def test_the_numbers_are_those_of_copies(runs: dict[str, Done]) -> None:
    """Restored, warmed up, trained and evaluated: the same bytes, quantized once instead of at every step."""
    assert runs["weights"].losses() == runs["copies"].losses()


@pytest.mark.parametrize("recipe", SWITCHED)
def test_the_switch_to_fp8_has_no_jump(recipe: str, runs: dict[str, Done]) -> None:
    healed, fp4 = runs[recipe].losses(), runs["weights"].losses()
    assert healed["train_loss"][:HEAL] == fp4["train_loss"][:HEAL]
    assert healed["train_loss"][HEAL] != fp4["train_loss"][HEAL]
    assert healed["eval_accuracy"][1] == pytest.approx(fp4["eval_accuracy"][1], abs=0.1)
    assert healed["eval_accuracy"][1] < healed["eval_accuracy"][0]
    stats = [event["value"] for event in events(runs[recipe].log, "tracked_stats")]
    assert {"linear_precision": "fp8"} in stats


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_adds_little_to_what_four_bits_have_lost(recipe: str) -> None:
    with cpu_platform((10, 0)):
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes

        from llama2_lora.training.healing import requantize

        with te.fp8_model_init(recipe=recipes.NVFP4BlockScaling()):
            layer = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16)
        exact = torch.randn(128, 128, dtype=torch.bfloat16) * 0.02
        with torch.no_grad():
            layer.weight.copy_(exact)
        four_bits = layer.weight.dequantize()
        assert 0.05 < error(four_bits, exact) < 0.15
        layer.bfloat16()  # as Megatron's Float16Module does
        assert torch.equal(layer.weight.dequantize(), four_bits)
        kinds = dict(
            delayed=recipes.DelayedScaling,
            tensorwise=recipes.Float8CurrentScaling,
            mxfp8=recipes.MXFP8BlockScaling,
            blockwise=recipes.Float8BlockScaling,
        )
        requantize(layer, kinds[recipe]())
        assert "Float8" in type(layer.weight).__name__ or "MXFP8" in type(layer.weight).__name__
        assert error(layer.weight.dequantize(), four_bits) < 0.04


def error(values: torch.Tensor, exact: torch.Tensor) -> float:
    """rms of the difference over rms of the exact values."""
    return float((values.float() - exact.float()).norm() / exact.float().norm())
