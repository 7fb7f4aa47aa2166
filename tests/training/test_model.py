"""Training and evaluation against transformers and PEFT: ten LoRA steps and the eval loss agree to 1e-5."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.training_runs import SEQUENCE, TRAIN_ROWS, VOCAB, Tiny, run_training, values
from llama2_lora.config import rules, schedule
from llama2_lora.data import packed
from llama2_lora.training.adapter import initial_a
from llama2_lora.training.cpu import cpu_platform
from llama2_lora.training.data import training_order
from llama2_lora.training.model import FP8_WEIGHT_SCALE, RowMeanLoss, prepare_fp8_weights

STEPS, GBS, LR, SEED = 10, 8, 1e-2, 7


@pytest.fixture(scope="module")
def ours(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The log of ten steps with an evaluation after every second one."""
    short = {"MAX_STEPS": str(STEPS), "LORA_DROPOUT": "0", "SEED": str(SEED), "LOSS_MASK_ALIGN": "reference"}
    done = run_training(tiny.environment(tmp_path_factory.mktemp("results"), **short))
    assert done.returncode == 1, done.stderr[-3000:]  # MAX_STEPS without the target
    return done.stdout


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> dict[str, list[float]]:
    """The same training with transformers, PEFT and torch's AdamW, A shared by q, k and v."""
    model = peft_model(tiny.hugging_face)
    parameters = [p for p in model.parameters() if p.requires_grad]  # each shared A once
    optimizer = torch.optim.AdamW(parameters, betas=rules.ADAM_BETAS, eps=rules.ADAM_EPSILON, weight_decay=1e-4)
    train = packed.open_split(tiny.data / "train.npy", SEQUENCE, VOCAB)
    validation = packed.open_split(tiny.data / "validation.npy", SEQUENCE, VOCAB)
    order = training_order(SEED, TRAIN_ROWS, STEPS * GBS).reshape(STEPS, GBS)
    losses: dict[str, list[float]] = {"train": [], "eval": []}
    for step in range(STEPS):
        loss = torch.stack([row_loss(model, train[row]) for row in order[step]]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, rules.GRADIENT_CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, LR, STEPS)
        optimizer.step()
        losses["train"].append(loss.item())
        if (step + 1) % 2 == 0:
            with torch.no_grad():
                losses["eval"].append(torch.stack([row_loss(model, row) for row in validation]).mean().item())
    return losses


def peft_model(folder: Path) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    for index, layer in enumerate(model.base_model.model.model.layers):
        attention, prefix = layer.self_attn, f"decoder.layers.{index}.self_attention"
        for target, projections in (("linear_qkv", ("q_proj", "k_proj", "v_proj")), ("linear_proj", ("o_proj",))):
            first = getattr(attention, projections[0]).lora_A["default"].weight
            first.data.copy_(initial_a(SEED, f"{prefix}.{target}.adapter.linear_in.weight", list(first.shape)))
            for projection in projections:
                getattr(attention, projection).lora_A["default"].weight = first
    return model


def row_loss(model: torch.nn.Module, record: np.void) -> torch.Tensor:
    """transformers' own loss of one row, labels -100 where the mask says so."""
    ids_BS = torch.from_numpy(record["input_ids"].astype(np.int64))[None]
    labels_BS = ids_BS.masked_fill(torch.from_numpy(record["loss_mask"] == 0)[None], -100)
    return model(input_ids=ids_BS, labels=labels_BS).loss


def test_ten_lora_steps_are_pefts(ours: str, reference: dict[str, list[float]]) -> None:
    assert len(reference["train"]) == STEPS
    assert values(ours, "train_loss") == pytest.approx(reference["train"], abs=1e-5)


def test_the_eval_loss_is_transformers_loss(ours: str, reference: dict[str, list[float]]) -> None:
    assert len(reference["eval"]) == 5
    assert values(ours, "eval_accuracy") == pytest.approx(reference["eval"], abs=1e-5)


def test_the_adapter_learned(reference: dict[str, list[float]]) -> None:
    """Without this the comparison could be one of two models that stand still."""
    assert reference["eval"][-1] < reference["eval"][0] - 0.05


def test_a_micro_batchs_loss_is_the_mean_over_its_rows() -> None:
    """By hand: clipping and Adam hide a wrong factor from every comparison of losses."""
    losses_BS = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    batch = {"loss_weights": torch.tensor([[0.5, 0.5], [1.0, 0.0]])}
    loss, part = RowMeanLoss(rows=8).forward(batch, losses_BS)
    assert loss.item() == (2.0 + 5.0) / 2
    assert part["total"].item() == 7.0


def test_frozen_fp8_weights_get_a_scale_and_drop_their_bf16_copy() -> None:
    quantized, plain = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2)
    cleared = []
    quantized.weight._quantizer = SimpleNamespace(scale=torch.ones(1))
    quantized.weight.clear_high_precision_init_val = lambda: cleared.append(True)
    prepare_fp8_weights(torch.nn.Sequential(quantized, plain))
    assert quantized.weight._quantizer.scale.item() == FP8_WEIGHT_SCALE
    assert cleared == [True]


def test_transformer_engines_fp8_weights_have_that_scale() -> None:
    """The same on Transformer Engine's own class, whose names the function relies on."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    quantizer = Float8Quantizer(torch.ones(1), torch.zeros(1), tex.DType.kFloat8E4M3)
    layer = torch.nn.Module()
    with cpu_platform():
        empty = quantizer.make_empty([16, 16], dtype=torch.bfloat16, device="cpu")
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
        prepare_fp8_weights(layer)
    assert layer.weight._quantizer.scale.item() == FP8_WEIGHT_SCALE
