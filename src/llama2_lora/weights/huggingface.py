"""A Hugging Face Llama on disk, read row by row: no model is built, and no more than a few MiB are held at a time.

A safetensors file is a JSON header (name, dtype, shape, byte range of each tensor) and the raw bytes, so rows are ranges of
the file. Files of the older kind, `pytorch_model*.bin`, are read through torch.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np

from llama2_lora.hub import client
from llama2_lora.llama2 import Block, LlamaShape, hf_tensors

PIECE_BYTES = 1 << 20
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # safetensors' names
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference; sharded ones have an index beside them
BASE = "meta-llama/Llama-2-70b-hf"
# What is downloaded of a repository: these files, and the first kind of weights that it has.
FETCHED = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.index.json")
FETCHED_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# Buffers that older checkpoints carry: computed from the configuration, not weights.
IGNORED = (".rotary_emb.inv_freq",)


class Tensor(NamedTuple):
    """Where a tensor lies. offset: of its first byte in the file (safetensors only)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class HFModel:
    """Configuration, tokenizer and weights of a Llama in a local folder. Opening it checks names, shapes and sizes."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """name: what the user calls this model, by default the folder."""
        self.folder = Path(folder)
        self.name = name or str(self.folder.resolve())
        self.config = _read_json(self.folder / "config.json")
        self.shape = LlamaShape.from_hf_config(self.config)
        self.tokenizer_files = [path for name in TOKENIZER_FILES if (path := self.folder / name).is_file()]
        if not any(path.name in ("tokenizer.json", "tokenizer.model") for path in self.tokenizer_files):
            raise ValueError(f"{self.folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there")
        self.files = _weight_files(self.folder)
        self.tensors = {name: tensor for file in self.files for name, tensor in _list_tensors(file).items()}
        self.stored_dtype = self._check()
        self.dtype = self.stored_dtype  # what read() gives; set it to another one to convert while reading

    def read(self, block: Block) -> Iterator[bytes]:
        """The bytes of a block, in pieces of at most 2 * PIECE_BYTES."""
        pieces = self._stored(block)
        return pieces if self.dtype == self.stored_dtype else (cast(p, self.stored_dtype, self.dtype) for p in pieces)

    def _stored(self, block: Block) -> Iterator[bytes]:
        tensor = self.tensors[block.tensor]
        row_bytes = math.prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype]
        left = block.rows * row_bytes
        if tensor.file.suffix == ".bin":
            yield from _read_bin(tensor.file, block)
            return
        # Opened anew for each block: mapped or held files count as this process's memory.
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + block.first * row_bytes)
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if len(piece) < min(left, PIECE_BYTES):
                    raise ValueError(f"{tensor.file} ends inside {block.tensor}: it was changed while it was read")
                left -= len(piece)
                yield piece

    def read_all(self, blocks: Iterable[Block]) -> Iterator[bytes]:
        """The bytes of several blocks, one behind the other."""
        return (piece for block in blocks for piece in self.read(block))

    def weight_bytes(self) -> int:
        return self.shape.parameters() * DTYPE_BYTES[self.dtype]

    def fingerprint(self) -> dict[str, list[Any]]:
        """Size and age of every file (or its hash, which names it in the hub's cache): another one is another source."""
        files = [self.folder / "config.json", *self.tokenizer_files, *self.files]
        return {
            file.name: [file.stat().st_size, file.resolve().name if file.is_symlink() else file.stat().st_mtime_ns]
            for file in files
        }

    def _check(self) -> str:
        """The one dtype of all weights. ValueError names tensors that are missing, too many, or of another shape."""
        expected = hf_tensors(self.shape)
        names = {name for name in self.tensors if not name.endswith(IGNORED)}
        if self.shape.tied:
            names.discard("lm_head.weight")  # some files hold the embedding a second time
        problems = [f"{name} is missing" for name in sorted(expected.keys() - names)]
        problems += [f"{name} is no tensor of this model" for name in sorted(names - expected.keys())]
        problems += [
            f"{name} has the shape {self.tensors[name].shape}, config.json asks for {expected[name]}"
            for name in sorted(names & expected.keys())
            if self.tensors[name].shape != expected[name]
        ]
        dtypes = {self.tensors[name].dtype for name in names}
        if not problems and (len(dtypes) > 1 or not dtypes <= DTYPE_BYTES.keys()):
            problems = [f"weights are {', '.join(sorted(dtypes))}: must all be one of {', '.join(DTYPE_BYTES)}"]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{self.folder}: {'; '.join(problems[:5])}{more}")
        return dtypes.pop()


def cast(data: bytes, old: str, new: str) -> bytes:
    return from_float32(to_float32(data, old), new)


def to_float32(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> bytes:
    """Rounds to nearest, ties to even, as torch does."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def open_model(source: str, revision: str = "main") -> HFModel:
    """A folder, or a repository: from the hub's cache where that has all of it, else downloaded into it."""
    if Path(source).is_dir():
        return HFModel(Path(source))
    try:
        cached = huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True)
        return HFModel(Path(cached), source)
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.LocalEntryNotFoundError, ValueError):
        return HFModel(_download(client.Repository(source, revision)), source)


def _download(repository: client.Repository) -> Path:
    """Bring what is needed of a repository into the hub's cache; returns the snapshot's folder."""
    repository, files = client.list_files(repository, (*FETCHED, *FETCHED_WEIGHTS))
    for kind in FETCHED_WEIGHTS:
        weights = [file for file in files if Path(file.path).match(kind)]
        if weights:
            break
    others = [file for file in files if not any(Path(file.path).match(kind) for kind in FETCHED_WEIGHTS)]
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    here = [huggingface_hub.try_to_load_from_cache(repository.id, f.path, revision=repository.revision) for f in weights]
    client.check_space(cache, sum(file.bytes for file, path in zip(weights, here, strict=True) if not isinstance(path, str)))
    names = [file.path for file in (*others, *weights)]
    print(f"downloading {repository.id} at {repository.revision}: {sum(f.bytes for f in weights) / 1e9:.1f} GB into {cache}")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    for tries_left in reversed(range(client.IDLE_TRIES)):
        try:
            return Path(huggingface_hub.snapshot_download(repository.id, revision=repository.revision, allow_patterns=names))
        except OSError as error:
            dropped = isinstance(error, client.TRANSIENT) or "Consistency check failed" in str(error)
            if not (dropped and tries_left):
                raise client.HubError(client.explain(error, repository)) from error
        time.sleep(client.WAIT_SECONDS)
    raise AssertionError("the last try returns or raises")


def _weight_files(folder: Path) -> list[Path]:
    """Files with the weights, from the index where there is one. ValueError names the ones that are missing."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted({folder / file for file in _read_json(index)["weight_map"].values()})
            if missing := [file.name for file in files if not file.is_file()]:
                raise ValueError(f"{folder}: {index.name} names {', '.join(missing)}, which is not there")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}, whole or with an index, is there")


def _list_tensors(file: Path) -> dict[str, Tensor]:
    return _list_bin(file) if file.suffix == ".bin" else _list_safetensors(file)


def _list_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= size - 8:
            raise ValueError(f"{path} is no safetensors file, or was cut off: fetch it again")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            raise ValueError(f"{path} is no safetensors file: fetch it again") from None
    start = 8 + header_bytes
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    expected = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, its header promises {expected}: fetch it again")
    return {
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _load_bin(path: Path) -> dict[str, Any]:
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many types: RuntimeError, UnpicklingError, EOFError...
        raise ValueError(f"{path} is damaged or no torch file ({type(error).__name__}): fetch it again") from None


def _list_bin(path: Path) -> dict[str, Tensor]:
    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    return {
        name: Tensor(path, names.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape), 0)
        for name, tensor in _load_bin(path).items()
    }


def _read_bin(path: Path, block: Block) -> Iterator[bytes]:
    import torch

    tensor = _load_bin(path)[block.tensor]  # mapped anew for each block, as above
    rows = tensor[block.first : block.first + block.rows].contiguous().view(torch.uint8).flatten().numpy()
    for start in range(0, len(rows), PIECE_BYTES):
        yield rows[start : start + PIECE_BYTES].tobytes()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON file: fetch it again") from None
