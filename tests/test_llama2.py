"""Shapes and the map between the two formats, against tables worked by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from llama2_lora.llama2 import (
    FC1,
    FINAL_NORM,
    LLAMA2_70B,
    QKV,
    LlamaShape,
    adapter_shapes,
    blocks,
    chunks,
    hf_tensors,
    stacks,
)

SMALL = dataclasses.replace(LLAMA2_70B, layers=2, hidden=8, ffn=6, heads=4, kv_groups=2, vocab=10)
HF_70B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def test_70b_from_its_config():
    assert LlamaShape.from_hf_config(HF_70B) == LLAMA2_70B
    assert LLAMA2_70B.head_dim == 128


def test_parameter_counts():
    # The model card's "69B": embeddings 2 x 32,000 x 8,192; a layer 8,192 x (10,240 + 8,192 + 3 x 28,672 + 2); a norm.
    assert LLAMA2_70B.parameters() == 68_976_648_192
    # A layer: (8,192 + 10,240) x 16 on linear_qkv, (8,192 + 8,192) x 16 on linear_proj.
    assert LLAMA2_70B.lora_parameters(16) == 44_564_480
    assert dataclasses.replace(SMALL, tied=True).parameters() == SMALL.parameters() - 10 * 8


def test_qkv_rows_are_query_heads_then_key_then_value_per_group():
    q, k, v = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
    assert blocks(SMALL, QKV, 1) == [(q, 0, 4), (k, 0, 2), (v, 0, 2), (q, 4, 4), (k, 2, 2), (v, 2, 2)]


def test_fc1_is_gate_then_up():
    assert blocks(SMALL, FC1, 0) == [("model.layers.0.mlp.gate_proj.weight", 0, 6), ("model.layers.0.mlp.up_proj.weight", 0, 6)]


def test_pieces_are_those_of_nemo():
    found = {(chunk.stack.name, chunk.place): chunk for chunk in chunks(SMALL)}
    assert len(found) == 3 + 2 * (5 + 2)  # gate and up are pieces of their own
    up = found[FC1, (1, 1, 0)]
    assert up.offset == (1, 6, 0)
    assert up.blocks == [("model.layers.1.mlp.up_proj.weight", 0, 6)]
    assert found[FINAL_NORM, (0,)].blocks == [("model.norm.weight", 0, 8)]


@pytest.mark.parametrize("shape", [SMALL, dataclasses.replace(SMALL, tied=True), dataclasses.replace(SMALL, kv_groups=4)])
def test_every_row_of_every_tensor_is_used_once(shape):
    used = Counter((b.tensor, row) for chunk in chunks(shape) for b in chunk.blocks for row in range(b.first, b.first + b.rows))
    assert used == Counter((name, row) for name, dims in hf_tensors(shape).items() for row in range(dims[0]))
    assert ("lm_head.weight" in hf_tensors(shape)) is not shape.tied


def test_stacked_shapes_of_the_70b():
    shapes = {stack.name: stack.shape for stack in stacks(LLAMA2_70B)}
    assert shapes[QKV] == (80, 10240, 8192)
    assert shapes[FC1] == (80, 57344, 8192)
    assert len(shapes) == 9


def test_adapter_shapes():
    shapes = adapter_shapes(SMALL, 3)
    assert len(shapes) == 2 * 4
    assert shapes["decoder.layers.1.self_attention.linear_qkv.adapter.linear_out.weight"] == (16, 3)
    assert shapes["decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight"] == (3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "mistral"}, "model_type is mistral, must be llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"num_key_value_heads": 7}, "heads 64, key/value groups 7"),
    ],
)
def test_other_models_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        LlamaShape.from_hf_config(HF_70B | change)


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError, match=r"hidden_act is gelu.*mlp_bias is True"):
        LlamaShape.from_hf_config(HF_70B | {"hidden_act": "gelu", "mlp_bias": True})
