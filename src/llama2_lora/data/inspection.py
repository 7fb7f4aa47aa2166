"""Is a folder fit to train on? Asked twice: before any GPU works, of every byte, and at the start of a run, of metadata alone.

problems(folder)    run.sub's probe and preflight, in processes of their own, before the caches are dropped
expected(folder)    train.py: no part of a timed run may touch the data set before run_start (rules §11)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama2_lora.config import rules
from llama2_lora.data import packed
from llama2_lora.data.rows import OpenSplit
from llama2_lora.llama2 import LLAMA2_70B

HEADER_SLACK = 64  # bytes: numpy pads headers to a multiple of it
ALL_SCORED = "scores every token, as training rows do, not only those of summaries: another file took its name"


class Expected(NamedTuple):
    """What is known of a split before it is opened."""

    rows: int
    sha256: str | None = None  # None: there is no manifest


def expected(directory: Path, sequence_length: int, vocab_size: int, gpu: bool) -> dict[str, Expected]:
    """Both splits of a folder, from the manifest and from metadata of the files alone: nothing is opened (rules §11).

    On GPUs rows of 8,192 tokens are the benchmark's, whose counts the rules fix: 3,901 and 173. Raises ValueError where
    manifest, sizes, row length or vocabulary contradict each other or what is asked for, OSError where a file is missing.
    """
    manifest = packed.read_manifest(directory)
    found = {}
    raw = gpu and sequence_length == rules.SEQUENCE_LENGTH
    for name, raw_rows in packed.SPLITS.items():
        entry = manifest["files"].get(name) if manifest else None
        if manifest and entry is None:
            raise ValueError(
                f"{Path(directory) / packed.MANIFEST} does not list {name}: {packed.again(Path(directory) / name)}"
            )
        rows = entry["rows"] if entry else raw_rows
        if raw and rows != raw_rows:
            raise ValueError(f"{Path(directory) / name} has {rows} rows: the rules fix {raw_rows}")
        _check_metadata(Path(directory) / name, rows, entry, sequence_length)
        found[name] = Expected(rows, entry["sha256"] if entry else None)
    if manifest and manifest["sequence_length"] != sequence_length:
        raise ValueError(f"{directory}: rows have {manifest['sequence_length']} tokens, MAX_SEQLEN={sequence_length}")
    if manifest and manifest["vocab_size"] > vocab_size:
        raise ValueError(
            f"{directory}: made for a vocabulary of {manifest['vocab_size']}, the model has {vocab_size}: another tokenizer"
        )
    return found


def _check_metadata(path: Path, rows: int, entry: dict[str, Any] | None, sequence_length: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: run `{packed.PREPARE} {path.parent}`")
    size = path.stat().st_size
    if entry and size != entry["bytes"]:
        raise ValueError(f"{path} has {size} bytes, the manifest says {entry['bytes']}: {packed.again(path)}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} cannot be read by this user: give it read permission")
    header = size - rows * packed.row_dtype(sequence_length).itemsize
    if entry and abs(header - packed.header_bytes(rows, sequence_length)) > HEADER_SLACK:
        raise ValueError(f"{path} has {size} bytes: no file of {rows} rows of {sequence_length} tokens (MAX_SEQLEN) has")


def open_splits(directory: Path, splits: dict[str, Expected], sequence_length: int, vocab_size: int) -> dict[str, OpenSplit]:
    """Both files of a run, open: headers, rows and the validation split's hash and rows are those of `expected`."""
    opened = {}
    for name, (rows, sha256) in splits.items():
        held = name == "validation.npy"
        path, sha256 = Path(directory) / name, sha256 if held else None
        opened[name] = OpenSplit(path, sequence_length, vocab_size, rows, held, sha256)
    validation = opened["validation.npy"]
    if all(records["loss_mask"].all() for records in list(validation.chunks())):
        raise ValueError(f"{validation.path} {ALL_SCORED}")
    return opened


def problems(directory: Path, gpu: bool, sequence_length: int | None = None, vocab_size: int | None = None) -> list[str]:
    """What is wrong with a folder, from every byte of it: sizes, headers, dtypes, rows, hashes, permissions, masks, rows that
    are in both splits. Row length and vocabulary are the manifest's where none are given. 0.6 s for GovReport."""
    directory = Path(directory)
    try:
        manifest = packed.read_manifest(directory)
        said = manifest or {"sequence_length": rules.SEQUENCE_LENGTH, "vocab_size": LLAMA2_70B.vocab}
        sequence_length, vocab_size = sequence_length or said["sequence_length"], vocab_size or said["vocab_size"]
        splits = expected(directory, sequence_length, vocab_size, gpu)
    except (OSError, ValueError) as error:
        return [str(error)]
    found: list[str] = []
    seen: dict[bytes, int] = {}
    for name, split in splits.items():
        try:
            rows = OpenSplit(directory / name, sequence_length, vocab_size, split.rows)
            if split.sha256 is not None:
                rows.refuse_other_hash(rows.sha256(), split.sha256)
            found += _problems_of_rows(name, rows, seen)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def _problems_of_rows(name: str, rows: OpenSplit, seen: dict[bytes, int]) -> Iterator[str]:
    """Of train.npy: tokens that are not scored. Of validation.npy: rows of train.npy, which `seen` tells by their hash."""
    all_scored, first, known = True, 0, []
    for records in rows.chunks():
        all_scored = all_scored and bool(records["loss_mask"].all())
        for row, ids_S in enumerate(records["input_ids"], first):
            digest = hashlib.blake2b(ids_S.tobytes(), digest_size=16).digest()
            if name == "train.npy":
                seen.setdefault(digest, row)
            elif digest in seen:
                known.append((row, seen[digest]))
        first += len(records)
    if known:
        row, train_row = known[0]
        yield f"{rows.path}: {len(known)} rows are training rows, such as row {row}, which is row {train_row} of train.npy"
    elif all_scored and name == "validation.npy":
        yield f"{rows.path} {ALL_SCORED}"
