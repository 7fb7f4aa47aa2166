"""What training reads and writes on disk: the NeMo checkpoint of the base model, and the LoRA adapter. Imports no torch.

CHECKPOINT/context/{io.json, model.yaml, nemo_tokenizer/}    what the model is
CHECKPOINT/weights/{metadata.json, common.pt, ...}           its weights, "zarr" or "torch_dist"
ADAPTER/{adapter.json, adapter.safetensors}                  rank, alpha, shape of the base; A and B of every layer
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2_lora import files
from llama2_lora.findings import one_line
from llama2_lora.llama2 import EMBEDDING, LlamaShape, adapter_shapes, stacks
from llama2_lora.weights.context import TOKENIZER, read_model_yaml
from llama2_lora.weights.stored import PREFIX, torch_dist_problems, weights_format, zarr_header, zarr_problems

AGAIN = "run scripts/convert_model.py or scripts/download_model.py again"
ADAPTER_JSON, ADAPTER_TENSORS = "adapter.json", "adapter.safetensors"


def read_shape(folder: Path) -> LlamaShape:
    """Shape of the model in a NeMo checkpoint. ValueError where there is no such checkpoint, or it is no Llama."""
    folder = Path(folder)
    shape, knows_vocab = read_model_yaml(folder / "context")
    if knows_vocab:
        return shape
    # NeMo's own contexts may leave the vocabulary to the tokenizer; the embedding has it, padded as the model has.
    header = zarr_header(folder / "weights" / (PREFIX + EMBEDDING))
    if header is None:
        raise ValueError(f"{folder}: neither context/model.yaml nor the weights tell the vocabulary's size")
    return dataclasses.replace(shape, vocab=header["shape"][0])


def check_checkpoint(folder: Path, shape: LlamaShape, dtype: str | None = None) -> None:
    """ValueError names all that a NeMo checkpoint of a model of this shape lacks, or has in another shape.

    dtype: "BF16" or "F32", in which training holds the weights, to check as well. NeMo's data-parallel ranks share the
    reading and exchange what they read; in the zarr format another dtype then becomes garbage, without an error.
    Reads names, headers and indexes, no weights, and refuses pickles that would run code: they are not loaded.
    """
    folder = Path(folder)
    problems = [f"{name} is missing" for name in ("context/io.json", "weights/common.pt") if not (folder / name).is_file()]
    tokenizer = folder / "context" / TOKENIZER
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        problems.append(f"context/{TOKENIZER} holds no tokenizer")
    weights = folder / "weights"
    match weights_format(folder):
        case "zarr":
            problems += zarr_problems(weights, stacks(shape), dtype)
        case "torch_dist":
            problems += torch_dist_problems(weights, stacks(shape), dtype)
        case other:
            problems.append(f"weights/metadata.json names the format {other}: must be zarr or torch_dist")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder}: {'; '.join(problems[:5])}{more}: {AGAIN}")


# The adapter ------------------------------------------------------------------------------------------------------


def write_adapter(path: Path, tensors: Mapping[str, Any], shape: LlamaShape, rank: int, alpha: int) -> None:
    """Write A and B of every layer, whole (not sharded), as NumPy arrays or torch tensors; replaces an older adapter.

    ValueError where a matrix is missing, too many, or of another shape; OSError where the disk is full. The folder appears when
    it is complete.
    """
    arrays = {name: tensor.numpy() if hasattr(tensor, "numpy") else tensor for name, tensor in tensors.items()}
    _check_adapter("the adapter", {name: array.shape for name, array in arrays.items()}, shape, rank)
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    about = {"rank": rank, "alpha": alpha, "base": dataclasses.asdict(shape)}
    try:
        with files.new_folder(path, replace=True) as folder:
            save_file(arrays, folder / ADAPTER_TENSORS)
            (folder / ADAPTER_JSON).write_text(json.dumps(about, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: the adapter could not be saved ({reason}): the run itself stands as its log says") from error


def read_adapter(path: Path) -> tuple[dict[str, Any], LlamaShape, int, int]:
    """(NumPy arrays by name, shape of the base, rank, alpha). ValueError where it is damaged or no adapter."""
    from safetensors.numpy import load_file

    path = Path(path)
    try:
        about = json.loads((path / ADAPTER_JSON).read_text())
        shape, rank, alpha = LlamaShape(**about["base"]), about["rank"], about["alpha"]
        if not all(type(value) is int and 0 < value < 1 << 20 for value in (rank, alpha)):
            raise ValueError(f"rank {rank!r:.40}, alpha {alpha!r:.40}")
        arrays = load_file(path / ADAPTER_TENSORS)
    except OSError as error:
        raise ValueError(f"{path} is no adapter: {error.filename} does not exist; train with SAVE_ADAPTER=1") from None
    except Exception as error:  # safetensors raises a type of its own
        raise ValueError(f"{path} is damaged ({one_line(str(error))}): train again with SAVE_ADAPTER=1") from None
    _check_adapter(str(path), {name: array.shape for name, array in arrays.items()}, shape, rank)
    return arrays, shape, rank, alpha


def _check_adapter(where: str, found: Mapping[str, tuple[int, ...]], shape: LlamaShape, rank: int) -> None:
    expected = adapter_shapes(shape, rank)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is no matrix of this model" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has the shape {tuple(found[name])}, must have {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:5])}{more}")
