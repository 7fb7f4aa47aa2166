"""A Hugging Face Llama on disk, read row by row: no model is built, and no more than a few MiB are held at a time.

A safetensors file is a JSON header (name, dtype, shape, byte range of each tensor) and the raw bytes, so rows are ranges of
the file. Files of the older kind, `pytorch_model*.bin`, are read through torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np

from llama2_lora.files import is_plain_name
from llama2_lora.findings import one_line
from llama2_lora.hub import client
from llama2_lora.hub.failures import Repository
from llama2_lora.llama2 import Block, LlamaShape, hf_tensors

PIECE_BYTES = 1 << 20
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # safetensors' names
# Unsigned integers of the same size, all bits but the sign, and the bits of infinity: NaN has larger ones.
BIT_PATTERNS = {
    "F32": ("<u4", np.uint32(0x7FFFFFFF), 0x7F800000),
    "F16": ("<u2", np.uint16(0x7FFF), 0x7C00),
    "BF16": ("<u2", np.uint16(0x7FFF), 0x7F80),
}
LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file: its own library's limit
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
BASE_NAMES = (BASE, "meta-llama/Llama-2-70B-hf")  # the hub takes both, its cache and file systems do not
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
        try:
            self.shape = LlamaShape.from_hf_config(self.config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.folder}: {one_line(str(error), limit=500)}") from None
        self.tokenizer_files = [path for name in TOKENIZER_FILES if (path := self.folder / name).is_file()]
        if not any(path.name in ("tokenizer.json", "tokenizer.model") for path in self.tokenizer_files):
            raise ValueError(f"{self.folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there")
        self.files = _weight_files(self.folder)
        self.tensors = {name: tensor for file in self.files for name, tensor in _list_tensors(file).items()}
        self.stored_dtype = self._check()
        self.dtype = self.stored_dtype  # what read() gives; set it to another one to convert while reading

    def read(self, block: Block) -> Iterator[bytes]:
        """The bytes of a block, in pieces of at most 2 * PIECE_BYTES. ValueError where a weight is NaN or infinite."""
        pieces = (self._finite(piece, block) for piece in self._stored(block))
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

    def _finite(self, piece: bytes, block: Block) -> bytes:
        bits, magnitude, infinity = BIT_PATTERNS[self.stored_dtype]
        if piece and int((np.frombuffer(piece, bits) & magnitude).max()) >= infinity:
            raise ValueError(
                f"{self.tensors[block.tensor].file}: {block.tensor} holds NaN or Inf: no model can be trained from it"
            )
        return piece

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
    """A folder, or a repository: from HF_HOME, be it the hub's cache or the checkpoint's own folder, else downloaded into the
    cache. Llama-2-70B is found under both spellings of its name, 70b and 70B."""
    if Path(source).is_dir():
        return HFModel(Path(source))
    if source.startswith(("/", ".", "~")):
        raise ValueError(f"{source}: no such folder; a source is a folder, or owner/name of a repository on the hub")
    is_base = source.lower() == BASE.lower()
    if is_base:
        for folder in _folders_in_hf_home():
            if (folder / "config.json").is_file():
                return HFModel(folder, source)
    for name in BASE_NAMES if is_base else (source,):
        try:
            cached = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
            return HFModel(Path(cached), source)
        except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.LocalEntryNotFoundError, ValueError):
            continue  # not there, or not all of it
    return HFModel(_download(Repository(source, revision)), source)


def _folders_in_hf_home() -> list[Path]:
    """HF_HOME itself, and where a clone of Llama-2-70B's repository would lie in it."""
    home = Path(huggingface_hub.constants.HF_HOME)
    return [home, *(home / name.split("/")[-1] for name in BASE_NAMES), *(home / name for name in BASE_NAMES)]


def _download(repository: Repository) -> Path:
    """Bring what is needed of a repository into the hub's cache; returns the snapshot's folder."""
    repository, files = client.list_files(repository, (*FETCHED, *FETCHED_WEIGHTS))
    weights: list[client.RemoteFile] = []
    for kind in FETCHED_WEIGHTS:
        weights = weights or [file for file in files if Path(file.path).match(kind)]
    others = [file for file in files if not any(Path(file.path).match(kind) for kind in FETCHED_WEIGHTS)]
    print(f"downloading {repository.id} at {repository.revision}: {sum(f.bytes for f in weights) / 1e9:.1f} GB", flush=True)
    return client.download_into_cache(repository, [*others, *weights])


def _weight_files(folder: Path) -> list[Path]:
    """Files with the weights, from the index where there is one. ValueError names the ones that are missing."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(folder / name for name in _names_in_index(index))
            if missing := [file.name for file in files if not file.is_file()]:
                raise ValueError(f"{folder}: {index.name} names {', '.join(missing)}, which is not there")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}, whole or with an index, is there")


def _names_in_index(index: Path) -> set[str]:
    """Names of files beside the index. ValueError where it is none, or names files elsewhere."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map of file names: fetch it again")
    names = set(places.values())
    if elsewhere := sorted(name for name in names if not is_plain_name(name)):
        raise ValueError(f"{index} names {elsewhere[0]!r:.100}, which is not beside it: fetch it again")
    return names


def _list_tensors(file: Path) -> dict[str, Tensor]:
    return _list_bin(file) if file.suffix == ".bin" else _list_safetensors(file)


def _list_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= size - 8:
            raise ValueError(f"{path} is no safetensors file, or was cut off: fetch it again")
        if header_bytes > LONGEST_HEADER:
            raise ValueError(
                f"{path} has a header of {header_bytes} bytes, safetensors allows {LONGEST_HEADER}: fetch it again"
            )
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is no safetensors file: fetch it again") from None
    start = 8 + header_bytes
    try:
        tensors = {
            name: Tensor(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        ranges = sorted((tuple(header[name]["data_offsets"]), name) for name in tensors)
        _check_ranges(tensors, ranges, size - start)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} has a damaged header: fetch it again") from None
    except ValueError as problem:
        raise ValueError(f"{path} {problem}: fetch it again") from None
    return tensors


def _check_ranges(tensors: dict[str, Tensor], ranges: list[tuple[tuple[int, int], str]], data_bytes: int) -> None:
    """ValueError where tensors overlap, leave gaps, or have another size than their dtype and shape say."""
    end = 0
    for (first, last), name in ranges:
        tensor = tensors[name]
        if any(type(value) is not int or value < 0 for value in (first, last, *tensor.shape)):
            raise TypeError
        if first != end or last < first:
            raise ValueError(f"has {name!r:.100} at bytes {first} to {last}, the tensor before it ends at {end}")
        size = DTYPE_BYTES.get(tensor.dtype)
        if size and last - first != size * math.prod(tensor.shape):
            raise ValueError(f"has {last - first} bytes for {name!r:.100}, {tensor.dtype} {tensor.shape}")
        end = last
    if end != data_bytes:
        raise ValueError(f"has {data_bytes} bytes of tensors, its header promises {end}")


def _load_bin(path: Path) -> dict[str, Any]:
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many types: RuntimeError, UnpicklingError, EOFError...
        raise ValueError(f"{path} is damaged or no torch file ({type(error).__name__}): fetch it again") from None


def _list_bin(path: Path) -> dict[str, Tensor]:
    import torch

    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    found = _load_bin(path)
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds something else than named tensors: fetch it again")
    return {
        name: Tensor(path, names.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape), 0)
        for name, tensor in found.items()
    }


def _read_bin(path: Path, block: Block) -> Iterator[bytes]:
    import torch

    tensor = _load_bin(path)[block.tensor]  # mapped anew for each block, as above
    rows = tensor[block.first : block.first + block.rows].contiguous().view(torch.uint8).flatten().numpy()
    for start in range(0, len(rows), PIECE_BYTES):
        yield rows[start : start + PIECE_BYTES].tobytes()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON file: fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not named values: fetch it again")
    return found
