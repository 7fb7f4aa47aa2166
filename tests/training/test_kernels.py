"""Options that choose kernels: the numbers stay. And layers that stay out of low precision."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.environments import VALID
from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny
from llama2_lora.config.settings import Settings
from llama2_lora.llama2 import LLAMA2_70B
from llama2_lora.training.cpu import cpu_platform

STEPS = 8
SHORT = {"MAX_STEPS": str(STEPS), "EVAL_EVERY_SEQUENCES": "32", "EVAL_SKIP": "0"}
SAME = {
    "rope": {"QKV_ROPE_FUSION": "1"},
    "offload": {"CPU_OFFLOAD_LAYERS": "1", "OFFLOAD_DOUBLE_BUFFER": "1"},
    "all layers exact in FP8": {"FP8": "1", "FP8_RECIPE": "tensorwise", "BF16_FIRST_LAYERS": "1", "BF16_LAST_LAYERS": "1"},
    "all layers exact in FP4": {"FP4": "1", "BF16_FIRST_LAYERS": "2"},
}
FP4_LAYERS = {
    "none": {"FP4": "1"},
    "first": {"FP4": "1", "BF16_FIRST_LAYERS": "1"},
    "last": {"FP4": "1", "BF16_LAST_LAYERS": "1"},
}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    return run_many(tiny, tmp_path_factory.mktemp("one"), {"plain": {}} | SAME | FP4_LAYERS, 1, **SHORT)


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    layouts = {"cp": {"CP": "2"}, "tp": {"TP": "2", "SP": "1"}}
    fused = {f"{name} rope": layout | SAME["rope"] for name, layout in layouts.items()}
    return run_many(tiny, tmp_path_factory.mktemp("two"), layouts | fused, 2, **SHORT)


def assert_same(run: Done, plain: Done) -> None:
    for key, losses in plain.losses().items():
        assert run.losses()[key] == pytest.approx(losses, abs=1e-5), key
    for name, wanted in plain.gradients(0).items():
        assert np.abs(run.gradients(0)[name] - wanted).max() < 1e-5, name


@pytest.mark.parametrize("option", SAME)
def test_an_option_changes_nothing(option: str, runs: dict[str, Done]) -> None:
    assert len(runs["plain"].losses()["train_loss"]) == STEPS
    assert_same(runs[option], runs["plain"])


@pytest.mark.parametrize("layout", ["cp", "tp"])
def test_packed_rotation_changes_nothing_on_two_ranks(layout: str, two_ranks: dict[str, Done]) -> None:
    assert_same(two_ranks[f"{layout} rope"], two_ranks[layout])


def test_the_layers_that_were_asked_for_stay_exact(runs: dict[str, Done]) -> None:
    """One of two layers in FP4: another loss than with both or neither, and the two layers are different ones."""
    first_losses = [runs[name].losses()["train_loss"][0] for name in ("plain", *FP4_LAYERS)]
    assert len(set(first_losses)) == 4, first_losses


def test_what_needs_a_gpu_reaches_megatron() -> None:
    """Built, not run: these two have no CPU kernel."""
    with cpu_platform():
        from megatron.core.extensions.transformer_engine import TEFusedMLP
        from nemo.collections.llm.gpt.model.base import default_layer_spec

        from llama2_lora.training.recipe import build_config

        settings = Settings.from_env(VALID | {"TP": "1", "OP_FUSER": "1", "CROSS_ENTROPY": "te"})
        config = build_config(settings, LLAMA2_70B)
        assert config.cross_entropy_loss_fusion
        assert config.cross_entropy_fusion_impl == "te"
        assert default_layer_spec(config).submodules.mlp.module is TEFusedMLP
        plain = build_config(Settings.from_env(VALID), LLAMA2_70B)
        assert plain.cross_entropy_fusion_impl == "native"
        assert default_layer_spec(plain).submodules.mlp.module is not TEFusedMLP
