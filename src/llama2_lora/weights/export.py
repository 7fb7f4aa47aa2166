"""A trained adapter -> PEFT's folder, or Hugging Face weights with the adapter merged in. NumPy, no model.

NeMo's fused linear_qkv has one A for q, k and v and one B whose rows are interleaved like the weight's (llama2.blocks). PEFT
has an A and a B for each: A is repeated, B is taken apart. The result is the same function, to the last bit of each product.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama2_lora import files
from llama2_lora.llama2 import ADAPTED, Block, LlamaShape, adapter_name, blocks, hf_tensors
from llama2_lora.weights.checkpoint import read_adapter
from llama2_lora.weights.huggingface import DTYPE_BYTES, HFModel, from_float32, to_float32

MERGED_ROWS = 1024  # of a weight at a time: 100 MB in the 70B


def write_peft(adapter: Path, output: Path, base: str) -> None:
    """Write the adapter as PEFT's `adapter_model.safetensors` and `adapter_config.json`; `base` is the model it names."""
    from safetensors.numpy import save_file

    arrays, shape, rank, alpha = read_adapter(adapter)
    tensors = {}
    for module, (a, b) in hf_adapter(arrays, shape).items():
        prefix = f"base_model.model.{module.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = a.copy()  # one A, stored once for each of q, k and v
        tensors[f"{prefix}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    with files.new_folder(output) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def hf_adapter(arrays: dict[str, np.ndarray], shape: LlamaShape) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Hugging Face weight name -> A [rank, in] and B [out, rank]."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    sizes = hf_tensors(shape)
    for layer in range(shape.layers):
        for target, weight in ADAPTED.items():
            prefix = adapter_name(layer, target)
            a, b = arrays[f"{prefix}.linear_in.weight"], arrays[f"{prefix}.linear_out.weight"]
            row = 0
            for name, first, rows in blocks(shape, weight, layer):
                _, part = found.setdefault(name, (a, np.empty((sizes[name][0], b.shape[1]), b.dtype)))
                part[first : first + rows] = b[row : row + rows]
                row += rows
    return found


def merge(adapter: Path, source: HFModel, output: Path, progress: Callable[[int], None] = lambda count: None) -> None:
    """Write `source` with W + alpha / rank * B A in place of W: the same files, as safetensors, and the tokenizer."""
    arrays, shape, rank, alpha = read_adapter(adapter)
    if shape != source.shape:
        raise ValueError(f"{adapter} was trained on {shape}, {source.folder} is {source.shape}")
    modules = hf_adapter(arrays, shape)
    with files.new_folder(output) as folder:
        for file in source.files:
            names = [name for name in hf_tensors(shape) if source.tensors[name].file == file]
            with (folder / _safetensors_name(file)).open("wb") as out:
                out.write(_header(source, names))
                for name in names:
                    for piece in _merged(source, name, modules.get(name), alpha / rank):
                        out.write(piece)
                        progress(len(piece))
        _write_rest(source, folder)


def _merged(source: HFModel, name: str, matrices: tuple[np.ndarray, np.ndarray] | None, scale: float) -> Iterator[bytes]:
    rows = source.tensors[name].shape[0]
    if matrices is None:
        yield from source.read(Block(name, 0, rows))
        return
    a, b = matrices
    for first in range(0, rows, MERGED_ROWS):
        part = b[first : first + MERGED_ROWS]
        weight = to_float32(b"".join(source.read(Block(name, first, len(part)))), source.dtype).reshape(len(part), -1)
        yield from_float32(weight + scale * (part.astype(np.float32) @ a.astype(np.float32)), source.dtype)


def _header(source: HFModel, names: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dims = source.tensors[name].shape
        start, end = end, end + int(np.prod(dims)) * DTYPE_BYTES[source.dtype]
        header[name] = {"dtype": source.dtype, "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _safetensors_name(file: Path) -> str:
    return f"{file.stem.replace('pytorch_model', 'model')}.safetensors"


def _write_rest(source: HFModel, folder: Path) -> None:
    for file in (source.folder / "config.json", *source.tokenizer_files):
        shutil.copyfile(file, folder / file.name)
    if len(source.files) > 1:
        place = {name: _safetensors_name(source.tensors[name].file) for name in hf_tensors(source.shape)}
        index = {"metadata": {"total_size": source.weight_bytes()}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
