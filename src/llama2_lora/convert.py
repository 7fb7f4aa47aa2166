"""A Hugging Face Llama -> a NeMo checkpoint, piece by piece. Neither a model nor NeMo is needed.

Both formats cut the weights into the same pieces (llama2.chunks); each becomes a file of its own here, so a conversion
that was stopped goes on with the first piece that is missing. All is built in OUTPUT/.partial and moved at the end, the
weights last: a folder without weights/ is not complete, one with it is.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llama2_lora.checkpoint import PREFIX
from llama2_lora.context import TORCH_DTYPES, read_provenance, write_context
from llama2_lora.huggingface import DTYPE_BYTES, HFModel
from llama2_lora.llama2 import FINAL_NORM, Chunk, LlamaShape, Stack, chunks, stacks

FORMATS = ("zarr", "torch_dist")
PARTIAL = ".partial"
ZARR_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
# Modules of Transformer Engine that expect a state of their own; None stands for none. All but the norm are stacked.
STATEFUL = (
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
)


def convert(source: HFModel, output: Path, format: str, progress: Callable[[int], None] = lambda count: None) -> bool:
    """Make `output`/{context, weights} from `source`; False where they are there already, from the same files.

    progress is called with the bytes of weights written since the last call. ValueError where `output` holds a
    checkpoint of other origin.
    """
    provenance = {"folder": str(source.folder), "format": format, "files": source.fingerprint()}
    if _is_there(output, provenance):
        return False
    partial = output / PARTIAL
    weights = partial / "weights"
    _start(partial, source, provenance)
    write = {"zarr": _write_zarr, "torch_dist": _write_torch_dist}[format]
    write(weights, source, progress)
    (weights / "common.pt").write_bytes(_torch_bytes({}))
    config = {"sharded_backend": format, "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    (weights / "metadata.json").write_text(json.dumps(config))
    _flush(partial)
    for name in ("context", "weights"):
        if (output / name).exists():
            shutil.rmtree(output / name)
        (partial / name).rename(output / name)
    shutil.rmtree(partial)
    return True


def weight_bytes(source: HFModel) -> int:
    return source.shape.parameters() * DTYPE_BYTES[source.dtype]


def _is_there(output: Path, provenance: dict[str, Any]) -> bool:
    if not (output / "weights").exists():
        return False
    found = read_provenance(output / "context")
    if found == provenance:
        return True
    if found is None or found["folder"] != provenance["folder"]:
        origin = f"made from {found['folder']}" if found else "that another program made"
        raise ValueError(f"{output} holds a checkpoint {origin}: remove it, or choose another --output_path")
    return False


def _start(partial: Path, source: HFModel, provenance: dict[str, Any]) -> None:
    """A folder to go on in: with the pieces of an earlier call from the same source, else empty."""
    if read_provenance(partial / "context") != provenance:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(partial / "context", ignore_errors=True)
    write_context(partial / "context", source, provenance)
    (partial / "weights").mkdir(exist_ok=True)


def chunk_bytes(source: HFModel, chunk: Chunk) -> int:
    return math.prod(chunk.stack.chunk) * DTYPE_BYTES[source.dtype]


def read_chunk(source: HFModel, chunk: Chunk) -> Iterator[bytes]:
    for block in chunk.blocks:
        yield from source.read(block)


# zarr: a folder per tensor, a file of raw bytes per chunk -----------------------------------------------------------


def zarr_file(weights: Path, chunk: Chunk) -> Path:
    return weights / (PREFIX + chunk.stack.name) / ".".join(map(str, chunk.index))


def _write_zarr(weights: Path, source: HFModel, progress: Callable[[int], None]) -> None:
    for stack in stacks(source.shape):
        array = weights / (PREFIX + stack.name)
        array.mkdir(exist_ok=True)
        (array / ".zarray").write_text(_zarr_header(stack, source.dtype))
    for chunk in chunks(source.shape):
        path, size = zarr_file(weights, chunk), chunk_bytes(source, chunk)
        if not (path.exists() and path.stat().st_size == size):
            with _appearing(path) as file:
                for piece in read_chunk(source, chunk):
                    file.write(piece)
        progress(size)
    for name in extra_states(source.shape):
        (weights / name).parent.mkdir(exist_ok=True)
        (weights / f"{name}.pt").write_bytes(_torch_bytes(None))


def _zarr_header(stack: Stack, dtype: str) -> str:
    header = {
        "chunks": stack.chunk,
        "compressor": None,
        "dtype": ZARR_DTYPES[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": stack.shape,
        "zarr_format": 2,
    }
    return json.dumps(header, indent=4)


# torch_dist: torch.distributed.checkpoint's files, one per chunk, and an index -------------------------------------------


def distcp_name(number: int) -> str:
    return f"__0_{number}.distcp"


def _write_torch_dist(weights: Path, source: HFModel, progress: Callable[[int], None]) -> None:
    import torch

    dtype = getattr(torch, TORCH_DTYPES[source.dtype])
    for number, chunk in enumerate(chunks(source.shape)):
        path = weights / distcp_name(number)
        if not path.exists():
            data = bytearray().join(read_chunk(source, chunk))
            with _appearing(path) as file:
                torch.save(torch.frombuffer(data, dtype=dtype).view(chunk.stack.chunk), file)
            del data
        progress(chunk_bytes(source, chunk))
    states = extra_states(source.shape)
    state = _torch_bytes([None])  # this format keeps a list of the objects under a key
    with _appearing(weights / "__0_states.distcp") as file:
        file.write(state * len(states))
    _write_index(weights, source.shape, dtype, len(state))


def _write_index(weights: Path, shape: LlamaShape, dtype: Any, state_bytes: int) -> None:
    """.metadata: which bytes of which file are which piece of which tensor."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    storage = {}
    for stack in stacks(shape):
        properties = dcp.TensorProperties(dtype=dtype)
        tensors[PREFIX + stack.name] = dcp.TensorStorageMetadata(properties, torch.Size(stack.shape), [])
    for number, chunk in enumerate(chunks(shape)):
        key, offset = PREFIX + chunk.stack.name, torch.Size(chunk.offset)
        tensors[key].chunks.append(dcp.ChunkStorageMetadata(offset, torch.Size(chunk.stack.chunk)))
        name = distcp_name(number)
        storage[dcp.MetadataIndex(key, offset)] = _StorageInfo(name, 0, (weights / name).stat().st_size)
    for number, name in enumerate(extra_states(shape)):
        tensors[name] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(name)] = _StorageInfo("__0_states.distcp", number * state_bytes, state_bytes)
    index = dcp.Metadata(state_dict_metadata=tensors, storage_data=storage)
    index.mcore_data = {PREFIX + stack.name: {} for stack in stacks(shape)}  # Megatron's, about flattened tensors
    with _appearing(weights / ".metadata") as file:
        pickle.dump(index, file)


# Both --------------------------------------------------------------------------------------------------------------


def extra_states(shape: LlamaShape) -> list[str]:
    """Keys of Transformer Engine's states, as Megatron names the shards of an object."""
    found = [f"{PREFIX}{FINAL_NORM.removesuffix('.weight')}._extra_state/shard_0_1"]
    for module in STATEFUL:
        for layer in range(shape.layers):
            found.append(f"{PREFIX}decoder.layers.{module}._extra_state/shard_{layer}_{shape.layers}")
    return found


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        yield file
    partial.replace(path)


def _torch_bytes(value: Any) -> bytes:
    """What torch.save writes for a value without tensors: a zip file with a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _flush(folder: Path) -> None:
    """Wait until all files are on disk, so that no crash of the node leaves a complete-looking folder."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
