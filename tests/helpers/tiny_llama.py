"""Tiny Llamas in Hugging Face's format, with random weights, written without building a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama2_lora.llama2 import LlamaShape, hf_tensors

TINY = LlamaShape(
    layers=4,
    hidden=32,
    ffn=48,
    heads=8,
    kv_groups=2,
    vocab=72,  # divides by TP=2, not by 128
    max_positions=64,
    norm_eps=1e-5,
    rope_base=10000.0,
    tied=False,
)


def write_llama(folder: Path, shape: LlamaShape = TINY, dtype: str = "float32", shards: int = 1, bin: bool = False) -> Path:
    """config.json, tokenizer and weights; more than one shard come with an index, `bin` as pytorch_model*.bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(shape, dtype)))
    write_tokenizer(folder, shape.vocab)
    tensors = weights(shape, dtype)
    names = sorted(tensors)
    stem, suffix = ("pytorch_model", "bin") if bin else ("model", "safetensors")
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    place = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = names[number::shards]  # q, k and v of a layer in different files
        save({name: tensors[name] for name in part}, folder / file)
        place |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def hf_config(shape: LlamaShape, dtype: str = "float32") -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
    }


def weights(shape: LlamaShape, dtype: str = "float32") -> dict[str, Any]:
    """Large enough that every tensor, and each one's place, matters to the logits."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, dims in hf_tensors(shape).items():
        values = torch.randn(dims, generator=generator)
        values = values * 0.15 if len(dims) > 1 else 1 + 0.3 * values
        made[name] = values.to(getattr(torch, dtype))
    return made


def save(tensors: dict[str, Any], path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def write_tokenizer(folder: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special))
