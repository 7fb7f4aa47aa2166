"""The packed data set on disk: plain .npy files that every rank maps, and what each row means. numpy only.

GovReport is packed: documents (prompt, summary, end-of-sequence token) stand one behind the other and are cut into rows
of S tokens; attention is causal over the whole row. A file holds one record a row, `input_ids` (uint16, S) and
`loss_mask` (uint8, S), so a row is one contiguous read of 3*S bytes and opening the file copies nothing.

    DIR/train.npy  DIR/validation.npy  DIR/manifest.json (counts, bytes, sha256, source)

loss_mask[t] is 1 where the data set's labels[t] is not -100. Which next-token target an entry belongs to is a choice
that `aligned_mask` makes at reading time.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama2_lora import files
from llama2_lora.config import rules

MANIFEST = "manifest.json"
SPLITS = {"train.npy": rules.TRAIN_SEQUENCES, "validation.npy": rules.EVAL_SEQUENCES}  # rows of the benchmark's own
LONGEST_HEADER = 4096  # bytes; ours have 192, longer ones are of other programs
IGNORED_LABEL = -100  # the label that Hugging Face's cross entropy leaves out
SCAN_ROWS = 256  # rows looked at in one go: 6 MiB at S = 8,192
PREPARE = "python scripts/download_dataset.py --data_dir"


def row_dtype(sequence_length: int) -> np.dtype:
    """Record of one row: 3 * sequence_length bytes, little-endian."""
    return np.dtype([("input_ids", "<u2", (sequence_length,)), ("loss_mask", "u1", (sequence_length,))])


def aligned_mask(loss_mask_S: np.ndarray, how: str) -> np.ndarray:
    """fp32 weight (0 or 1) of the loss at each position t, whose target is token t+1. The last one has no target: 0.

    how="nvidia": weight[t] = loss_mask[t], the pairing of NVIDIA's submissions; it scores the first token after each
    scored span and misses the first of the span itself. how="reference": weight[t] = loss_mask[t+1], which scores a
    target where its own label is kept, as transformers does. Leading axes pass through.
    """
    weights_S = np.zeros(loss_mask_S.shape, dtype=np.float32)
    if how == "nvidia":
        weights_S[..., :-1] = loss_mask_S[..., :-1]
    elif how == "reference":
        weights_S[..., :-1] = loss_mask_S[..., 1:]
    else:
        raise ValueError(f"LOSS_MASK_ALIGN={how}: must be nvidia or reference")
    return weights_S


def pack(
    documents: Iterable[tuple[Sequence[int], Sequence[int]]], sequence_length: int, end_token: int, score: str
) -> tuple[np.ndarray, np.ndarray]:
    """(prompt ids, summary ids) pairs -> input_ids_NS (uint16) and loss_mask_NS (uint8).

    score="all" scores every token, as the train split does; score="summary" leaves out prompts and end tokens, as the
    validation split does. What is left over at the end is dropped, and so is a row without a scored target, which could
    have no loss. Raises ValueError where the documents fill no row.
    """
    if score not in ("all", "summary"):
        raise ValueError(f"score={score}: must be all or summary")
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    for prompt, summary in documents:
        ids.append(np.concatenate([prompt, summary, [end_token]]).astype(np.int64))
        scored = np.zeros(len(ids[-1]), dtype=np.uint8)
        scored[slice(None) if score == "all" else slice(len(prompt), -1)] = 1
        mask.append(scored)
    tokens = sum(map(len, ids))
    rows = tokens // sequence_length
    if not rows:
        raise ValueError(f"the documents have {tokens} tokens: at least one row of {sequence_length} is needed")
    cut = rows * sequence_length
    ids_NS = _as_uint16(np.concatenate(ids)[:cut].reshape(rows, sequence_length))
    mask_NS = np.concatenate(mask)[:cut].reshape(rows, sequence_length)
    keep = _has_scored_target(mask_NS)
    return ids_NS[keep], mask_NS[keep]


def write_split(path: Path, ids_NS: np.ndarray, mask_NS: np.ndarray) -> None:
    """Write one split; the file appears under its name only when it is whole and on disk."""
    rows, sequence_length = ids_NS.shape
    write_chunks(path, rows, sequence_length, [(ids_NS, mask_NS)])


def write_chunks(path: Path, rows: int, sequence_length: int, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """write_split for (input_ids_NS, loss_mask_NS) chunks that together have `rows` rows; holds one chunk at a time."""
    dtype = row_dtype(sequence_length)
    written = 0
    with files.new_file(path) as file:
        file.write(_header(rows, dtype))
        for ids_NS, mask_NS in chunks:
            file.write(_records(ids_NS, mask_NS, dtype))
            written += len(ids_NS)
        if written != rows:
            raise ValueError(f"{Path(path).name}: {written} rows came, {rows} were announced")


def header_bytes(rows: int, sequence_length: int) -> int:
    """Size of the header of a file of so many rows."""
    return len(_header(rows, row_dtype(sequence_length)))


def _header(rows: int, dtype: np.dtype) -> bytes:
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def write_manifest(directory: Path, sequence_length: int, vocab_size: int, source: str, revision: str) -> dict[str, Any]:
    """Hash the splits that lie in `directory` and write its manifest (atomically); returns the manifest."""
    directory = Path(directory)
    dtype = np.lib.format.dtype_to_descr(row_dtype(sequence_length))
    entries = {}
    for path in (directory / name for name in SPLITS):
        if path.exists():
            rows = _open_records(path, sequence_length).shape[0]
            digest = files.file_sha256(path)
            entries[path.name] = {"rows": rows, "bytes": path.stat().st_size, "sha256": digest, "dtype": dtype}
    manifest = {
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "source": source,
        "revision": revision,
        "files": entries,
    }
    with files.new_file(directory / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none. Opens no split: its counts may be known before run_start (rules §6.4)."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        problem = _manifest_problem(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # no JSON, no UTF-8
        problem = "it is no JSON file"
    if problem:
        raise ValueError(f"{path} is damaged: remove it and run `{PREPARE} {directory}` ({problem})")
    return manifest


def _manifest_problem(manifest: Any) -> str | None:
    """What is wrong with a manifest's types and values; None where it may be believed."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return "it lists no files"
    for name in ("sequence_length", "vocab_size"):
        if not _is_count(manifest.get(name)):
            return f"{name} is {manifest.get(name)!r:.60}"
    for name in ("source", "revision"):
        if not isinstance(manifest.get(name), str):
            return f"{name} is {manifest.get(name)!r:.60}"
    for name, entry in manifest["files"].items():
        if name not in SPLITS or not isinstance(entry, dict):
            return f"it lists {name!r:.60}"
        if not (_is_count(entry.get("rows")) and _is_count(entry.get("bytes"))):
            return f"{name} has {entry.get('rows')!r:.60} rows, {entry.get('bytes')!r:.60} bytes"
        if not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
            return f"{name} has no sha256"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 62


def open_split(path: Path, sequence_length: int, vocab_size: int, rows: int | None = None) -> np.memmap:
    """Map a split: records (N,) with fields input_ids (N, S) and loss_mask (N, S). Checks every row on the way.

    Raises FileNotFoundError where the file is missing; ValueError where it is truncated, has another row length or
    count than asked for, is a pickle, holds ids outside the vocabulary or a row without a scored target.
    """
    path = Path(path)
    records = _open_records(path, sequence_length)
    if rows is not None and len(records) != rows:
        raise ValueError(f"{path} has {len(records)} rows, {rows} were expected: {again(path)}")
    for start in range(0, len(records), SCAN_ROWS):
        chunk = records[start : start + SCAN_ROWS]
        try:
            check_rows(chunk["input_ids"], chunk["loss_mask"], vocab_size, start)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
    return records


def check_rows(ids_NS: np.ndarray, mask_NS: np.ndarray, vocab_size: int, first_row: int = 0) -> None:
    """ValueError where an id is outside [0, vocab_size), a mask is not 0 or 1, or a row scores no target."""
    lowest, highest = int(ids_NS.min(initial=0)), int(ids_NS.max(initial=0))
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"token id {wrong}: must be below the vocabulary of {vocab_size}; another tokenizer made it")
    if mask_NS.max(initial=0) > 1:
        raise ValueError(f"loss_mask has the value {mask_NS.max()}: must be 0 or 1")
    scored = _has_scored_target(mask_NS)
    if not scored.all():
        raise ValueError(f"row {first_row + int(scored.argmin())} scores no token: its loss would be 0 / 0")


def _open_records(path: Path, sequence_length: int) -> np.memmap:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `{PREPARE} {path.parent}`, or set DATADIR to where it is")
    with path.open("rb") as file:
        rows, offset = parse_header(file, path, sequence_length)
    check_size(path, path.stat().st_size, rows, offset, sequence_length)
    return np.memmap(path, dtype=row_dtype(sequence_length), mode="r", offset=offset, shape=(rows,))


def parse_header(file: BinaryIO, path: Path, sequence_length: int) -> tuple[int, int]:
    """Number of rows, and size of the header in bytes, of a .npy file of such rows; its data stay untouched.

    ValueError, which names `path`, where it is another file.
    """
    shape, dtype = _read_header(file, path)
    if dtype.hasobject:
        raise ValueError(
            f"{path} holds pickled objects, which run code when they are loaded: "
            f"convert it once with `{PREPARE} {path.parent} --import-pickle` if you trust who wrote it"
        )
    if dtype != row_dtype(sequence_length) or len(shape) != 1:
        packed = dtype.names == ("input_ids", "loss_mask") and len(dtype["input_ids"].shape) == 1
        found = str(dtype["input_ids"].shape[0]) if packed else f"{dtype} {shape}"
        raise ValueError(f"{path} has rows of {found:.200}, {sequence_length} tokens were expected: {again(path)}")
    if not _is_count(shape[0]):
        raise ValueError(f"{path} has {shape[0]} rows: {again(path)}")
    return shape[0], file.tell()


def check_size(path: Path, size: int, rows: int, offset: int, sequence_length: int) -> None:
    """ValueError where a file has not the size of its header and its rows."""
    promised = offset + rows * row_dtype(sequence_length).itemsize
    if size != promised:
        raise ValueError(f"{path} has {size} bytes, its header promises {promised}: {again(path)}")


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception:  # a Python literal that is evaluated: damaged ones raise a dozen types
        raise ValueError(f"{path} is not a .npy file: {again(path)}") from None
    return shape, dtype


def again(path: Path) -> str:
    """What to do about a damaged split."""
    return f"make it again with `{PREPARE} {path.parent}`"


def _records(ids_NS: np.ndarray, mask_NS: np.ndarray, dtype: np.dtype) -> bytes:
    shape = (len(ids_NS), *dtype["input_ids"].shape)
    if ids_NS.shape != shape or mask_NS.shape != shape:
        raise ValueError(f"rows have ids {ids_NS.shape} and masks {mask_NS.shape}: both must be {shape}")
    records = np.empty(len(ids_NS), dtype=dtype)
    records["input_ids"] = _as_uint16(ids_NS)
    records["loss_mask"] = mask_NS
    return records.tobytes()


def _as_uint16(ids: np.ndarray) -> np.ndarray:
    if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(np.uint16).max:
        raise ValueError(f"token ids {ids.min()} to {ids.max()}: must be within 0 to 65535, as Llama-2's 32,000 are")
    return ids.astype(np.uint16, copy=False)


def _has_scored_target(mask_NS: np.ndarray) -> np.ndarray:
    """bool_N: at least one target counts, whichever alignment is chosen (the outermost positions count in one only)."""
    return mask_NS[:, :-1].any(axis=1) & mask_NS[:, 1:].any(axis=1)
