"""A Hugging Face Llama -> a NeMo checkpoint. Neither a model nor NeMo is needed, and the weights are never in memory.

All is built in OUTPUT/.partial and moved at the end, the weights last: with weights/ a folder is complete, without it is
not. A conversion that was stopped is continued by the next one from the same files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llama2_lora import files
from llama2_lora.llama2 import chunks
from llama2_lora.weights.checkpoint import check_checkpoint, read_shape
from llama2_lora.weights.context import read_provenance, write_context
from llama2_lora.weights.formats import LAYOUTS, Progress, write_common
from llama2_lora.weights.huggingface import HFModel
from llama2_lora.weights.stored import weights_format

STAGING = ".partial"


def convert(source: HFModel, output: Path, format: str, progress: Progress = lambda count: None) -> bool:
    """Make `output`/{context, weights} from `source`; False where they are there already, from the same files.

    ValueError where `output` holds a checkpoint of other origin; one from the same source, which has changed since, is
    replaced.
    """
    provenance = {"source": source.name, "format": format, "dtype": source.dtype, "files": source.fingerprint()}
    if _is_there(output, provenance):
        return False
    with files.lock(output / ".lock"):
        if _is_there(output, provenance):  # another process made it since
            return False
        staging = output / STAGING
        if read_provenance(staging / "context") != provenance:
            shutil.rmtree(staging, ignore_errors=True)
            write_context(staging / "context", source, provenance)
        weights = staging / "weights"
        weights.mkdir(exist_ok=True)
        LAYOUTS[format].write(weights, source, progress)
        write_common(weights, format)
        files.move_into(output, staging, ("context", "weights"))
    return True


def verify(source: HFModel, output: Path, progress: Progress = lambda count: None) -> None:
    """Read both sides back. ValueError names the first ten pieces that differ, or what `output` lacks."""
    check_checkpoint(output, source.shape)
    if (found := read_shape(output)) != source.shape:
        raise ValueError(f"{output}: the context describes {found}, the source is {source.shape}")
    read = LAYOUTS[weights_format(output) or ""].reader(output / "weights")
    different = []
    for chunk in chunks(source.shape):
        with read(chunk) as stored:
            pieces = source.read_all(chunk.blocks)
            if not all(stored.read(len(piece)) == piece for piece in pieces) or stored.read(1):
                different.append(f"{chunk.stack.name} {list(chunk.place)}")
            progress(stored.tell())
    if different:
        more = f" and {len(different) - 10} more" if len(different) > 10 else ""
        raise ValueError(f"{output}: {', '.join(different[:10])}{more} differ from {source.folder}: convert it again")


def _is_there(output: Path, provenance: dict[str, Any]) -> bool:
    if not (output / "weights").exists():
        return False
    found = read_provenance(output / "context")
    if found == provenance:
        return True
    if found is None or found["source"] != provenance["source"]:
        origin = f"made from {found['source']}" if found else "that another program made"
        raise ValueError(f"{output} holds a checkpoint {origin}: remove it, or choose another --output_path")
    return False
