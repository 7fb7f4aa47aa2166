"""GovReport, from wherever it comes, as the folder that training reads; and that folder checked, or in NVIDIA's form.

    DATA_DIR/train.npy  DATA_DIR/validation.npy  DATA_DIR/manifest.json

All three are made in DATA_DIR/.download and move to their places when they are whole. Other files stay untouched.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llama2_lora import files
from llama2_lora.config import rules
from llama2_lora.data import packed, sources
from llama2_lora.hub import client
from llama2_lora.hub.failures import Repository
from llama2_lora.llama2 import LLAMA2_70B

STAGING = ".download"
SPLITS = {
    "train.npy": sources.Split(rules.TRAIN_SEQUENCES, rules.SEQUENCE_LENGTH, LLAMA2_70B.vocab, all_scored=True),
    "validation.npy": sources.Split(rules.EVAL_SEQUENCES, rules.SEQUENCE_LENGTH, LLAMA2_70B.vocab, all_scored=False),
}
OUTPUT_BYTES = sum(split.rows * 3 * split.sequence_length for split in SPLITS.values())
Read = Callable[[str], Iterator[sources.Chunk]]  # chunks of train.npy or validation.npy


def check(data_dir: Path) -> None:
    """ValueError or FileNotFoundError where the folder does not hold the whole data set, unchanged."""
    manifest = packed.read_manifest(data_dir)
    for name, split in SPLITS.items():
        path = data_dir / name
        records = packed.open_split(path, split.sequence_length, split.vocab_size, split.rows)
        if manifest is None:
            raise ValueError(f"{data_dir} has no {packed.MANIFEST}: run `{packed.PREPARE} {data_dir}`")
        if files.file_sha256(path) != manifest["files"].get(name, {}).get("sha256"):
            raise ValueError(f"{path} has another hash than {packed.MANIFEST} says: it was changed or damaged")
        if split.all_scored and not records["loss_mask"].all():
            raise ValueError(f"{path}: some tokens are not scored, in the train split all are")
        print(f"{describe(path, split)}, verified")


def fetch(data_dir: Path) -> None:
    """Download and convert, unless the folder is complete."""
    repository = Repository(rules.DATASET_REPOSITORY, rules.DATASET_REVISION, "dataset")
    manifest = packed.read_manifest(data_dir)
    if manifest and (manifest["source"], manifest["revision"]) == repository[:2]:
        try:
            check(data_dir)
            return
        except (OSError, ValueError) as problem:
            print(f"made again: {problem}", flush=True)
    refuse_foreign(data_dir)
    repository, listed = client.list_files(repository, ["data/train-*.parquet", "data/validation-*.parquet"])
    print(f"{repository.id} at {repository.revision}: {sum(file.bytes for file in listed) / 1e6:.1f} MB of parquet", flush=True)
    staging = data_dir / STAGING
    with files.lock(data_dir / ".lock"):
        client.download(repository, listed, staging, spare_bytes=OUTPUT_BYTES)
        convert_locked(read_folder(staging), data_dir, repository.id, repository.revision)


def import_pickles(source: Path, data_dir: Path) -> None:
    """Convert the files of NVIDIA's script, which may lie in `data_dir` itself: then they are replaced."""
    print(
        f"warning: {source} holds pickles. Nothing but numbers is taken from them, yet read files of people you trust only",
        file=sys.stderr,
        flush=True,
    )

    def read(name: str) -> Iterator[sources.Chunk]:
        return sources.read_pickle(source / name, SPLITS[name])

    convert(read, data_dir, "pickles of NVIDIA's script", "unknown", replace=source.resolve() == data_dir.resolve())


def export_pickles(data_dir: Path, target: Path) -> None:
    """Write the files of NVIDIA's script from the folder that training reads."""
    if target.resolve() == data_dir.resolve():
        raise ValueError(f"--export-pickle {target}: must be another folder than --data_dir, the files have the same names")
    for name, split in SPLITS.items():
        records = packed.open_split(data_dir / name, split.sequence_length, split.vocab_size, split.rows)
        sources.write_pickle(target / name, records)
        print(f"{target / name}: {(target / name).stat().st_size:,} bytes")


def read_folder(folder: Path) -> Read:
    """Reader of the parquet files in a folder, or in its data/."""

    def read(name: str) -> Iterator[sources.Chunk]:
        pattern = f"{Path(name).stem}-*.parquet"
        paths = sorted(folder.glob(pattern)) or sorted((folder / "data").glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {pattern}, nor has its data/")
        return sources.read_parquet(paths, SPLITS[name])

    return read


def convert(read: Read, data_dir: Path, source: str, revision: str, replace: bool = False) -> None:
    """Write both splits and the manifest. ValueError where other files have their names, unless `replace`."""
    if not replace:
        refuse_foreign(data_dir)
    for name in SPLITS:
        read(name)  # both are there before anything is written
    with files.lock(data_dir / ".lock"):
        convert_locked(read, data_dir, source, revision)


def convert_locked(read: Read, data_dir: Path, source: str, revision: str) -> None:
    """`convert`, for the process that holds the folder's lock."""
    started = time.monotonic()
    staging = data_dir / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    client.check_space(staging, OUTPUT_BYTES)
    for name, split in SPLITS.items():
        packed.write_chunks(staging / name, split.rows, split.sequence_length, read(name))
    packed.write_manifest(staging, rules.SEQUENCE_LENGTH, LLAMA2_70B.vocab, source, revision)
    # The manifest first: a stop between two moves leaves files that are not what it says, and the next call sees that.
    files.move_into(data_dir, staging, (packed.MANIFEST, *SPLITS))
    for name, split in SPLITS.items():
        print(describe(data_dir / name, split))
    print(f"{data_dir}: complete ({time.monotonic() - started:.1f} s to convert)")


def describe(path: Path, split: sources.Split) -> str:
    return f"{path}: {split.rows:,} rows of {split.sequence_length:,} tokens, {path.stat().st_size / 1e6:.1f} MB"


def refuse_foreign(data_dir: Path) -> None:
    """ValueError where a file of the same name stands there that `convert` did not write."""
    manifest = packed.read_manifest(data_dir)
    rows = {name: file["rows"] for name, file in manifest["files"].items()} if manifest else {}
    found = [name for name in SPLITS if (data_dir / name).exists()]
    if found and rows != {name: split.rows for name, split in SPLITS.items()}:
        raise ValueError(
            f"{data_dir / found[0]} was not written by this script and is not replaced: choose another --data_dir, "
            "or give --import-pickle where it is a file of NVIDIA's script"
        )
