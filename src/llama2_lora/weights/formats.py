"""The two formats of a NeMo checkpoint's weights, written and read a piece at a time.

Both cut the weights into the same pieces (llama2.chunks), and each piece becomes a file of its own here. A file has its
name only once it is whole, so writing goes on where it was stopped.

    zarr        weights/TENSOR/.zarray (JSON) and weights/TENSOR/I.J.K, the raw bytes of a piece
    torch_dist  weights/__0_N.distcp, torch.save of piece N, and weights/.metadata, a pickled index of them
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from llama2_lora import files, pickles
from llama2_lora.llama2 import FINAL_NORM, Chunk, LlamaShape, Stack, chunks, stacks
from llama2_lora.weights.context import TORCH_DTYPES
from llama2_lora.weights.huggingface import HFModel
from llama2_lora.weights.stored import PREFIX, ZARR_DTYPES

Progress = Callable[[int], None]  # called with the bytes done since the last call
# Modules of Transformer Engine that keep a state of their own, in every layer; so does the final norm.
STATEFUL = (
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
)


class Zarr:
    """Layout of one folder per tensor. Reads and writes no torch object but the tiny ones of _torch_bytes."""

    def write(self, weights: Path, source: HFModel, progress: Progress) -> None:
        for stack in stacks(source.shape):
            array = weights / (PREFIX + stack.name)
            array.mkdir(exist_ok=True)
            (array / ".zarray").write_text(_zarr_header(stack, source.dtype))
        for chunk in chunks(source.shape):
            path = _zarr_file(weights, chunk)
            if not path.exists():
                with files.new_file(path, sync=False) as file:
                    file.writelines(source.read_all(chunk.blocks))
            progress(path.stat().st_size)
        for name in extra_states(source.shape):
            (weights / name).parent.mkdir(exist_ok=True)
            (weights / f"{name}.pt").write_bytes(_torch_bytes(None))

    def reader(self, weights: Path) -> Callable[[Chunk], BinaryIO]:
        """What gives the stored bytes of a piece."""
        return lambda chunk: _zarr_file(weights, chunk).open("rb")


def _zarr_file(weights: Path, chunk: Chunk) -> Path:
    return weights / (PREFIX + chunk.stack.name) / ".".join(map(str, chunk.place))


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


class TorchDist:
    """Layout of torch.distributed.checkpoint. Holds one piece in memory (470 MB in the 70B), beside torch."""

    def write(self, weights: Path, source: HFModel, progress: Progress) -> None:
        import torch

        dtype = getattr(torch, TORCH_DTYPES[source.dtype])
        for number, chunk in enumerate(chunks(source.shape)):
            path = weights / _distcp_name(number)
            data = bytearray(chunk.stack.chunk_elements * dtype.itemsize)
            if not path.exists():
                filled = 0
                for piece in source.read_all(chunk.blocks):
                    data[filled : filled + len(piece)] = piece
                    filled += len(piece)
                with files.new_file(path, sync=False) as file:
                    torch.save(torch.frombuffer(data, dtype=dtype).view(chunk.stack.chunk), file)
            progress(len(data))
        states = extra_states(source.shape)
        state = _torch_bytes([None])  # this format keeps a list of the objects under a key
        with files.new_file(weights / "__0_states.distcp", sync=False) as file:
            file.write(state * len(states))
        with files.new_file(weights / ".metadata", sync=False) as file:
            pickle.dump(_index(weights, source.shape, dtype, len(state)), file)

    def reader(self, weights: Path) -> Callable[[Chunk], BinaryIO]:
        """What gives the stored bytes of a piece, which it finds through the index."""
        import torch
        from torch.distributed.checkpoint.metadata import MetadataIndex

        data = (weights / ".metadata").read_bytes()
        pickles.load(io.BytesIO(data), pickles.INDEX_NAMES)  # ValueError where it asks for more
        index = pickle.loads(data)

        def read(chunk: Chunk) -> BinaryIO:
            place = index.storage_data[MetadataIndex(PREFIX + chunk.stack.name, torch.Size(chunk.offset))]
            tensor = torch.load(weights / place.relative_path, weights_only=True)
            return io.BytesIO(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

        return read


def _distcp_name(number: int) -> str:
    return f"__0_{number}.distcp"


def _index(weights: Path, shape: LlamaShape, dtype: Any, state_bytes: int) -> Any:
    """Which bytes of which file are which piece of which tensor."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp

    # PRIVATE: torch 2.13 torch.distributed.checkpoint.filesystem._StorageInfo
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {}
    storage = {}
    for stack in stacks(shape):
        properties = dcp.TensorProperties(dtype=dtype)
        entries[PREFIX + stack.name] = dcp.TensorStorageMetadata(properties, torch.Size(stack.shape), [])
    for number, chunk in enumerate(chunks(shape)):
        key, offset, name = PREFIX + chunk.stack.name, torch.Size(chunk.offset), _distcp_name(number)
        entries[key].chunks.append(dcp.ChunkStorageMetadata(offset, torch.Size(chunk.stack.chunk)))
        storage[dcp.MetadataIndex(key, offset)] = _StorageInfo(name, 0, (weights / name).stat().st_size)
    for number, name in enumerate(extra_states(shape)):
        entries[name] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(name)] = _StorageInfo("__0_states.distcp", number * state_bytes, state_bytes)
    index = dcp.Metadata(state_dict_metadata=entries, storage_data=storage)
    vars(index)["mcore_data"] = {PREFIX + stack.name: {} for stack in stacks(shape)}  # Megatron's, on flattened tensors
    return index


LAYOUTS: dict[str, Zarr | TorchDist] = {"zarr": Zarr(), "torch_dist": TorchDist()}


def write_common(weights: Path, format: str) -> None:
    """What both formats have beside the tensors; metadata.json, by which Megatron knows a checkpoint, comes last."""
    (weights / "common.pt").write_bytes(_torch_bytes({}))
    config = {"sharded_backend": format, "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    (weights / "metadata.json").write_text(json.dumps(config))


def extra_states(shape: LlamaShape) -> list[str]:
    """Keys of Transformer Engine's states, as Megatron names the shards of an object. None is stored for each."""
    found = [f"{PREFIX}{FINAL_NORM.removesuffix('.weight')}._extra_state/shard_0_1"]
    for module in STATEFUL:
        for layer in range(shape.layers):
            found.append(f"{PREFIX}decoder.layers.{module}._extra_state/shard_{layer}_{shape.layers}")
    return found


def _torch_bytes(value: Any) -> bytes:
    """What torch.save writes for a value without tensors: a zip file with a pickle."""
    buffer = io.BytesIO()
    entries = {"data.pkl": pickle.dumps(value, protocol=2), "byteorder": b"little", "version": b"3\n"}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # dated 1980: the same bytes in every conversion
    return buffer.getvalue()
