"""Llama-2's shape, and where each of its Hugging Face tensors lies in a Megatron checkpoint. Pure: it moves no bytes.

A Megatron checkpoint stacks the layers: `decoder.layers.mlp.linear_fc2.weight` is [layers, hidden, ffn]. Each of its
layers is made of row blocks of Hugging Face tensors, in this order:

    linear_qkv   per key/value group: its query heads, then its key head, then its value head
    linear_fc1   gate, then up
    all others   one tensor, unchanged

Linear weights are [out, in] on both sides. Both sides rotate the halves of a head, so heads keep their rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_LAYERS = 10_000  # no model has a tenth of it; a damaged file may say anything


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """What of a Llama model's configuration decides its weights and what they compute."""

    layers: int
    hidden: int
    ffn: int
    heads: int  # query heads
    kv_groups: int  # key/value heads
    vocab: int
    max_positions: int
    norm_eps: float
    rope_base: float
    tied: bool  # the output layer is the embedding

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "kv_groups", "vocab", "max_positions"):
            value = getattr(self, name)
            least = 0 if name == "vocab" else 1  # 0: not known yet
            most = MOST_LAYERS if name == "layers" else (1 << 31) - 1
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: must be a whole number from {least} to {most}")
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r:.60}: must be a positive number")
        if type(self.tied) is not bool:
            raise ValueError(f"tied is {self.tied!r:.60}: must be true or false")
        if self.heads % self.kv_groups or self.hidden % self.heads:
            raise ValueError(
                f"hidden {self.hidden}, heads {self.heads}, key/value groups {self.kv_groups}: "
                "each must be a multiple of the next"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_groups) * self.head_dim

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> LlamaShape:
        """From a Hugging Face config.json. ValueError names every entry that makes the model another than Llama-2."""
        if problems := list(_hf_config_problems(config)):
            raise ValueError("config.json: " + "; ".join(problems))
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            heads=heads,
            kv_groups=config.get("num_key_value_heads") or heads,
            vocab=config["vocab_size"],
            max_positions=config.get("max_position_embeddings", 2048),  # transformers' defaults, as below
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_base=config.get("rope_theta", 10000.0),
            tied=config.get("tie_word_embeddings", False),
        )

    def parameters(self) -> int:
        """Weights of the whole model; a tied output layer counts once."""
        in_layer = self.hidden * (self.qkv_rows + self.hidden + 3 * self.ffn + 2)
        outside = self.hidden * (self.vocab * (1 if self.tied else 2) + 1)
        return self.layers * in_layer + outside

    def lora_parameters(self, rank: int) -> int:
        """Weights of A and B on linear_qkv and linear_proj of all layers."""
        return sum(rows * columns for rows, columns in adapter_shapes(self, rank).values())


LLAMA2_70B = LlamaShape(
    layers=80,
    hidden=8192,
    ffn=28672,
    heads=64,
    kv_groups=8,
    vocab=32000,
    max_positions=4096,
    norm_eps=1e-5,
    rope_base=10000.0,
    tied=False,
)

HF_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# What Llama-2 does not have, with the value under which a config.json may mention it.
HF_FIXED: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


def _hf_config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name in HF_REQUIRED:
        if not isinstance(config.get(name), int) or config[name] < 1:
            yield f"{name} is {config.get(name)}, must be a positive integer"
    for name, value in HF_FIXED.items():
        if config.get(name, value) != value:
            yield f"{name} is {config[name]}, must be {value}"
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("head_dim") and hidden and heads and config["head_dim"] * heads != hidden:
        yield f"head_dim is {config['head_dim']}, must be hidden_size / num_attention_heads"


# Names and blocks -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Rows `first` to `first + rows` of one Hugging Face tensor."""

    tensor: str
    first: int
    rows: int


class Stack(NamedTuple):
    """A tensor of a Megatron checkpoint.

    name: without the checkpoint's "module." prefix. shape: as stored. chunk: shape of the pieces that NeMo cuts it into.
    stacked: whether the first axis is the layer.
    """

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    stacked: bool

    @property
    def chunk_elements(self) -> int:
        return math.prod(self.chunk)


class Chunk(NamedTuple):
    """One piece of a Stack: its place in the grid of pieces, and the blocks that it is made of, one below the other."""

    stack: Stack
    place: tuple[int, ...]
    blocks: list[Block]

    @property
    def offset(self) -> tuple[int, ...]:
        return tuple(i * size for i, size in zip(self.place, self.stack.chunk, strict=True))


EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
INPUT_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
MLP_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"

# What LoRA adapts: Megatron's module in each layer's attention -> its weight
ADAPTED = {"linear_qkv": QKV, "linear_proj": PROJ}

_HF_OUTSIDE = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", OUTPUT: "lm_head.weight"}
_HF_IN_LAYER = {
    PROJ: "self_attn.o_proj.weight",
    FC2: "mlp.down_proj.weight",
    INPUT_NORM: "input_layernorm.weight",
    MLP_NORM: "post_attention_layernorm.weight",
}


def stacks(shape: LlamaShape) -> list[Stack]:
    """Every weight of a Megatron checkpoint of this shape."""
    outside = {EMBEDDING: (shape.vocab, shape.hidden), FINAL_NORM: (shape.hidden,)}
    if not shape.tied:
        outside[OUTPUT] = (shape.vocab, shape.hidden)
    in_layer: dict[str, tuple[int, ...]] = {
        QKV: (shape.qkv_rows, shape.hidden),
        PROJ: (shape.hidden, shape.hidden),
        FC1: (2 * shape.ffn, shape.hidden),
        FC2: (shape.hidden, shape.ffn),
        INPUT_NORM: (shape.hidden,),
        MLP_NORM: (shape.hidden,),
    }
    found = [Stack(name, dims, dims, False) for name, dims in outside.items()]
    for name, dims in in_layer.items():
        piece = (shape.ffn, shape.hidden) if name == FC1 else dims  # gate and up are cut apart
        found.append(Stack(name, (shape.layers, *dims), (1, *piece), True))
    return found


def blocks(shape: LlamaShape, name: str, layer: int | None = None) -> list[Block]:
    """The row blocks of Hugging Face tensors that, one below the other, are this layer of a stack (or the whole tensor)."""
    if name in _HF_OUTSIDE:
        return [Block(_HF_OUTSIDE[name], 0, shape.hidden if name == FINAL_NORM else shape.vocab)]
    prefix = f"model.layers.{layer}."
    if name in _HF_IN_LAYER:
        return [Block(prefix + _HF_IN_LAYER[name], 0, shape.hidden)]
    if name == FC1:
        return [Block(f"{prefix}mlp.{part}_proj.weight", 0, shape.ffn) for part in ("gate", "up")]
    assert name == QKV, name
    head, queries = shape.head_dim, shape.heads // shape.kv_groups * shape.head_dim
    found = []
    for group in range(shape.kv_groups):
        found.append(Block(f"{prefix}self_attn.q_proj.weight", group * queries, queries))
        found.append(Block(f"{prefix}self_attn.k_proj.weight", group * head, head))
        found.append(Block(f"{prefix}self_attn.v_proj.weight", group * head, head))
    return found


def chunks(shape: LlamaShape) -> Iterator[Chunk]:
    """Every piece of a Megatron checkpoint of this shape."""
    for stack in stacks(shape):
        for layer in range(shape.layers) if stack.stacked else (None,):
            first = stack.stacked  # the axis of rows
            pieces = stack.shape[first] // stack.chunk[first]
            found = blocks(shape, stack.name, layer)
            each = len(found) // pieces
            for piece in range(pieces):
                place = (*(() if layer is None else (layer,)), piece, *(0,) * (len(stack.shape) - first - 1))
                yield Chunk(stack, place, found[piece * each : (piece + 1) * each])


def hf_tensors(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model."""
    found: dict[str, tuple[int, ...]] = {}
    for stack, _, parts in chunks(shape):
        columns = stack.shape[stack.stacked + 1 :]
        for block in parts:
            rows = max(block.first + block.rows, found.get(block.tensor, (0,))[0])
            found[block.tensor] = (rows, *columns)
    return found


def adapter_name(layer: int, target: str) -> str:
    """Megatron's name of an adapter, with the layer's index in the whole model."""
    return f"decoder.layers.{layer}.self_attention.{target}.adapter"


def adapter_shapes(shape: LlamaShape, rank: int) -> dict[str, tuple[int, int]]:
    """Name and shape of every LoRA matrix: A (linear_in) is [rank, in], B (linear_out) is [out, rank]."""
    weights = {stack.name: stack.shape[1:] for stack in stacks(shape)}
    found = {}
    for layer in range(shape.layers):
        for target, weight in ADAPTED.items():
            rows, columns = weights[weight]
            found[f"{adapter_name(layer, target)}.linear_in.weight"] = (rank, columns)
            found[f"{adapter_name(layer, target)}.linear_out.weight"] = (rows, rank)
    return found
