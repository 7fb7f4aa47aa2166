#!/usr/bin/env python3
"""Download GovReport as the benchmark has it, tokenized and packed, and write the files that training maps.

    python scripts/download_dataset.py --data_dir /data/gov_report

    /data/gov_report/train.npy         3,901 rows of 8,192 tokens and their loss masks, 96 MB
    /data/gov_report/validation.npy    173 rows, 4 MB
    /data/gov_report/manifest.json     counts, dtypes, sha256, source and revision

The files are plain arrays: np.load(path, mmap_mode="r", allow_pickle=False) opens them in no time and copies nothing. Every
row is checked: its length, ids within the vocabulary, masks that score something, labels that equal the ids in the train
split. The files appear under their names only when all are whole; a call that was stopped is continued by the next one, a
call on a complete folder verifies it. Other files in the folder stay untouched. No GPU is needed.

Needs 0.5 GB of free disk. HF_TOKEN and HF_HOME mean what they mean to the hub's library; what is in its cache is taken
from there, with HF_HUB_OFFLINE=1 nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llama2_lora import files
from llama2_lora.config import rules
from llama2_lora.data import packed, sources
from llama2_lora.hub import client

VOCAB_SIZE = 32_000  # of Llama-2's tokenizer
STAGING = ".download"
SPLITS = {
    "train.npy": sources.Split(rules.TRAIN_SEQUENCES, rules.SEQUENCE_LENGTH, VOCAB_SIZE, all_scored=True),
    "validation.npy": sources.Split(rules.EVAL_SEQUENCES, rules.SEQUENCE_LENGTH, VOCAB_SIZE, all_scored=False),
}
OUTPUT_BYTES = sum(split.rows * 3 * split.sequence_length for split in SPLITS.values())
Read = Callable[[str], Iterator[sources.Chunk]]  # chunks of train.npy or validation.npy


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the data set; created if need be")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="take the repository's train-*.parquet and validation-*.parquet from this folder, or its data/, "
        "and ask no hub; with --import-pickle: the folder of the pickles",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="verify the files in --data_dir and write nothing")
    what.add_argument(
        "--import-pickle",
        action="store_true",
        help="replace train.npy and validation.npy of NVIDIA's script (pickled lists) by plain arrays",
    )
    what.add_argument(
        "--export-pickle", type=Path, metavar="DIR", help="write the files of NVIDIA's script into DIR, for its containers"
    )
    arguments = parser.parse_args(argv)
    if arguments.source and (arguments.check or arguments.export_pickle):
        parser.error("--source: files are read from --data_dir with --check and --export-pickle")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    data_dir: Path = arguments.data_dir
    try:
        if arguments.check:
            check(data_dir)
        elif arguments.export_pickle:
            export_pickles(data_dir, arguments.export_pickle)
        elif arguments.import_pickle:
            import_pickles(arguments.source or data_dir, data_dir)
        elif arguments.source:
            convert(read_folder(arguments.source), data_dir, str(arguments.source), "unknown")
        else:
            fetch(data_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run the command again, it continues", file=sys.stderr)
        return 130
    return 0


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
    repository = client.Repository(rules.DATASET_REPOSITORY, rules.DATASET_REVISION, "dataset")
    manifest = packed.read_manifest(data_dir)
    if manifest and (manifest["source"], manifest["revision"]) == repository[:2]:
        try:
            check(data_dir)
            return
        except (OSError, ValueError) as problem:
            print(f"made again: {problem}", flush=True)
    refuse_foreign(data_dir)
    repository, files = client.list_files(repository, ["data/train-*.parquet", "data/validation-*.parquet"])
    print(f"{repository.id} at {repository.revision}: {sum(file.bytes for file in files) / 1e6:.1f} MB of parquet", flush=True)
    client.download(repository, files, data_dir / STAGING, spare_bytes=OUTPUT_BYTES)
    convert(read_folder(data_dir / STAGING), data_dir, repository.id, repository.revision)


def import_pickles(source: Path, data_dir: Path) -> None:
    print(
        f"warning: {source} holds pickles. Nothing but numbers is taken from them, yet read files of people you trust only",
        file=sys.stderr,
        flush=True,
    )
    read = lambda name: sources.read_pickle(source / name, SPLITS[name])  # noqa: E731
    convert(read, data_dir, "pickles of NVIDIA's script", "unknown", replace=source.resolve() == data_dir.resolve())


def export_pickles(data_dir: Path, target: Path) -> None:
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
    """Write both splits and the manifest into the staging folder, then move them to their places."""
    started = time.monotonic()
    if not replace:
        refuse_foreign(data_dir)
    chunks = {name: read(name) for name in SPLITS}  # both are there before the first byte is written
    staging = data_dir / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    client.check_space(staging, OUTPUT_BYTES)
    for name, split in SPLITS.items():
        packed.write_chunks(staging / name, split.rows, split.sequence_length, chunks[name])
    packed.write_manifest(staging, rules.SEQUENCE_LENGTH, VOCAB_SIZE, source, revision)
    # The manifest first: a stop between two moves leaves files that are not what it says, and the next call sees that.
    for name in (packed.MANIFEST, *SPLITS):
        (staging / name).replace(data_dir / name)
    shutil.rmtree(staging)
    for name, split in SPLITS.items():
        print(describe(data_dir / name, split))
    print(f"{data_dir}: complete ({time.monotonic() - started:.1f} s to convert)")


def describe(path: Path, split: sources.Split) -> str:
    return f"{path}: {split.rows:,} rows of {split.sequence_length:,} tokens, {path.stat().st_size / 1e6:.1f} MB"


def refuse_foreign(data_dir: Path) -> None:
    """ValueError where a file of the same name stands there that this script did not write."""
    manifest = packed.read_manifest(data_dir)
    rows = {name: file["rows"] for name, file in manifest["files"].items()} if manifest else {}
    found = [name for name in SPLITS if (data_dir / name).exists()]
    if found and rows != {name: split.rows for name, split in SPLITS.items()}:
        raise ValueError(
            f"{data_dir / found[0]} was not written by this script and is not replaced: choose another --data_dir, "
            "or give --import-pickle where it is a file of NVIDIA's script"
        )


if __name__ == "__main__":
    sys.exit(main())
