"""The weights/ folder of a NeMo checkpoint, looked through before anything loads it: names, headers, indexes, pickles.

    zarr        TENSOR/.zarray and one file per chunk, TENSOR/I.J.K
    torch_dist  .metadata, a pickled index, and the *.distcp files that it points into

Each function yields what is wrong, a line each. Needs no torch and reads no weights: a fraction of a second.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2_lora import pickles
from llama2_lora.files import is_plain_name
from llama2_lora.llama2 import Stack

PREFIX = "module."  # NeMo's name for the model inside its Lightning module
ZARR_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}  # safetensors' names -> zarr's
TORCH_DTYPES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
MOST_CHUNKS = 100_000  # whose names are compared; a damaged header may ask for billions


def weights_format(folder: Path) -> str | None:
    """ "zarr" or "torch_dist", as Megatron finds it; None where there is no whole checkpoint."""
    try:
        found = json.loads((Path(folder) / "weights" / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def zarr_header(array: Path) -> dict[str, Any] | None:
    """The header of an array; None where there is none, or it is no zarr header."""
    try:
        header = json.loads((array / ".zarray").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(header, dict) and {"shape", "chunks", "dtype", "order", "fill_value"} <= header.keys()
    return header if whole and _are_sizes(header["shape"]) and _are_sizes(header["chunks"]) else None


def zarr_problems(weights: Path, stacks: Sequence[Stack], dtype: str | None) -> Iterator[str]:
    """What is wrong with the arrays of these stacks, and with common.pt."""
    for stack in stacks:
        if problem := _zarr_problem(weights, stack, dtype):
            yield problem
    yield from _problems_of_common(weights)


def torch_dist_problems(weights: Path, stacks: Sequence[Stack], dtype: str | None) -> Iterator[str]:
    """What is wrong with the index, with what it says of these stacks, with the files that it points to, and with common.pt."""
    try:
        with (weights / ".metadata").open("rb") as file:
            index = pickles.load(file, pickles.INDEX_NAMES)
        tensors, places = _entries(index)
    except FileNotFoundError:
        yield "weights/.metadata is missing"
        return
    except ValueError as problem:
        yield f"weights/.metadata: {problem}"
        return
    for stack in stacks:
        name = PREFIX + stack.name
        found = tensors.get(name)
        if found is None:
            yield f"weights/.metadata lists no {name}"
        elif found[0] != stack.shape:
            yield f"{name} has the shape {found[0]}, the context asks for {stack.shape}"
        elif dtype and found[1] != TORCH_DTYPES[dtype]:
            yield f"{name} is {found[1]}, training holds it in {TORCH_DTYPES[dtype]} (--dtype)"
        elif name not in {key for key, *_ in places}:
            yield f"weights/.metadata says of no file that it holds {name}"
    yield from _problems_of_places(weights, places)
    yield from _problems_of_common(weights)


def _zarr_problem(weights: Path, stack: Stack, dtype: str | None) -> str | None:
    array = weights / (PREFIX + stack.name)
    if not (array / ".zarray").is_file():
        return f"weights/{array.name} is missing"
    header = zarr_header(array)
    if header is None:
        return f"weights/{array.name}/.zarray is damaged"
    if (found := tuple(header["shape"])) != stack.shape:
        return f"weights/{array.name} has the shape {found}, the context asks for {stack.shape}"
    if header["dtype"] not in ZARR_DTYPES.values() or header.get("filters"):
        return f"weights/{array.name} is {header['dtype']!r} with filters {header.get('filters')!r}: must hold plain numbers"
    if dtype and header["dtype"] != ZARR_DTYPES[dtype]:
        return f"weights/{array.name} is {header['dtype']}, training holds it in {ZARR_DTYPES[dtype]} (--dtype)"
    if len(header["chunks"]) != len(found):
        return f"weights/{array.name}/.zarray is damaged: chunks {header['chunks']} of an array of {len(found)} axes"
    return _chunk_problem(array, found, header)


def _chunk_problem(array: Path, shape: tuple[int, ...], header: dict[str, Any]) -> str | None:
    """A chunk that is not there, or under another name, would be read as zeros. Other programs may cut others than we do."""
    counts = [-(-size // piece) for size, piece in zip(shape, header["chunks"], strict=True)]
    separator = header.get("dimension_separator", ".")
    found = {path.name: path for path in array.iterdir() if path.name[0] != "."}
    if (total := _product(counts)) > max(len(found), MOST_CHUNKS):
        return f"weights/{array.name} has {len(found)} of {total} chunks"
    places = itertools.product(*(range(count) for count in counts))
    expected = {separator.join(map(str, place)) for place in places}
    if missing := sorted(expected - found.keys()):
        also = sorted(found.keys() - expected)
        instead = f", and has {also[0]!r} instead" if also else ""
        return f"weights/{array.name} lacks {len(missing)} of {len(expected)} chunks, such as {missing[0]}{instead}"
    if header.get("compressor") is None:
        chunk_bytes = _product(header["chunks"]) * (4 if header["dtype"] == "<f4" else 2)
        for name in sorted(expected):
            if (size := found[name].stat().st_size) != chunk_bytes:
                return f"weights/{array.name}/{name} has {size} bytes, must have {chunk_bytes}"
    return None


def _entries(index: Any) -> tuple[dict[str, tuple[tuple[int, ...], str]], list[tuple[str, str, int, int]]]:
    """Tensors, {name: (shape, dtype)}, and places, (name, file, offset, bytes)."""
    try:
        tensors = {}
        for name, entry in index.get("state_dict_metadata").items():
            if entry.path.endswith(".TensorStorageMetadata"):
                (shape,) = entry.get("size").arguments
                properties = entry.get("properties")
                dtype = properties.get("dtype") or properties.state[0]
                tensors[str(name)] = (tuple(shape), str(dtype.path))
        places = []
        for key, place in index.get("storage_data").items():
            where = (str(key.get("fqn")), place.get("relative_path"), place.get("offset"), place.get("length"))
            if not (isinstance(where[1], str) and _are_sizes(where[2:], least=0)):
                raise TypeError
            places.append(where)
    except Exception:  # of any type: all of it is the file's own
        raise ValueError("it is no index of torch.distributed.checkpoint") from None
    return tensors, places


def _problems_of_places(weights: Path, places: list[tuple[str, str, int, int]]) -> Iterator[str]:
    """Files that are missing or short."""
    sizes: dict[str, int | None] = {}
    for name, file, offset, length in places:
        if file not in sizes:
            plain = is_plain_name(file) and (weights / file).is_file()
            sizes[file] = (weights / file).stat().st_size if plain else None
            if sizes[file] is None:
                yield f"weights/{file[:120]}, of {name}, is missing or lies elsewhere"
        size = sizes[file]
        if size is not None and size < offset + length:
            yield f"weights/{file} has {size} bytes, of which {name} needs {offset + length}"


def _problems_of_common(weights: Path) -> Iterator[str]:
    """common.pt, which every rank loads.

    The other objects, Transformer Engine's _extra_state, may be what they like: training leaves them out (restore.py), and
    a checkpoint of a stranger's FP8 run holds classes there that nobody here has to know.
    """
    if (path := weights / "common.pt").is_file():
        try:
            pickles.check_torch_file(path)
        except ValueError as problem:
            yield str(problem)


def _are_sizes(values: Any, least: int = 1) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) is int and value >= least for value in values)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
