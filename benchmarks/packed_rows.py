#!/usr/bin/env python3
"""The data set's way to training against the plain one: pandas rows -> list of dicts -> np.save, np.load with pickle.

    python benchmarks/packed_rows.py [--runs 3] [--folder DIR]

Parquet files of the real shape (3,901 and 173 rows of 8,192 tokens) are made up; every measurement is a process of its own,
both ways take turns, and the best run counts. Peak memory is what the step adds to interpreter and imports. To open means
to be ready for the first row: the plain way unpickles, ours maps and, as training does, checks every row; the memory that
this takes is pages of the file, which all ranks of a node share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llama2_lora.config import rules
from llama2_lora.data import packed, prepare
from llama2_lora.llama2 import LLAMA2_70B

ROWS = {"train": rules.TRAIN_SEQUENCES, "validation": rules.EVAL_SEQUENCES}
S = rules.SEQUENCE_LENGTH


class Cost(NamedTuple):
    seconds: float  # on the clock
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work, 0.5 GB (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for split in ROWS:
            make_parquet(folder / "source" / f"{split}-00000-of-00001.parquet", ROWS[split], split == "validation")
        costs: dict[Callable[[Path], None], list[Cost]] = {}
        for _ in range(arguments.runs):
            for step in (plain_convert, our_convert, datasets_read, our_read, plain_open, our_open, our_map):
                costs.setdefault(step, []).append(measured(step, folder))
        report({step: Cost(*map(min, zip(*runs, strict=True))) for step, runs in costs.items()}, folder)


def make_parquet(path: Path, rows: int, validation: bool) -> None:
    """Random ids whose frequencies fall off as those of words do; in the validation split half of each row is not scored."""
    ids_NS = np.random.default_rng(rows).zipf(1.3, (rows, S)).clip(3, 31_999).astype(np.int32)
    labels_NS = ids_NS.copy()
    labels_NS[:, : S // 2 * validation] = packed.IGNORED_LABEL
    starts = pa.array(np.arange(rows + 1, dtype=np.int32) * S)
    columns = {"input_ids": ids_NS, "labels": labels_NS}
    path.parent.mkdir(exist_ok=True)
    table = pa.table({name: pa.ListArray.from_arrays(starts, pa.array(data.ravel())) for name, data in columns.items()})
    pq.write_table(table, path, row_group_size=1000)


def measured(step: Callable[[Path], None], folder: Path) -> Cost:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost, (step, folder))


def cost(step: Callable[[Path], None], folder: Path) -> Cost:
    before, started, cpu_started = peak_mib(), time.perf_counter(), time.process_time()
    step(folder)
    return Cost(time.perf_counter() - started, time.process_time() - cpu_started, peak_mib() - before)


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent of this process, too
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def plain_convert(folder: Path) -> None:
    (folder / "plain").mkdir(exist_ok=True)
    for split in ROWS:
        frame = pd.read_parquet(folder / "source" / f"{split}-00000-of-00001.parquet")
        samples = [
            {
                "input_ids": row["input_ids"],
                "loss_mask": [int(label != packed.IGNORED_LABEL) for label in row["labels"]],
                "seq_start_id": [0],
            }
            for _, row in frame.iterrows()
        ]
        np.save(folder / "plain" / f"{split}.npy", samples)


def our_convert(folder: Path) -> None:
    """The command's own function: reading, all checks, fsync, hashes and manifest included."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    prepare.convert(prepare.read_folder(folder / "source"), folder / "ours", "made up", "none")


def our_read(folder: Path) -> None:
    """Nothing but the reading of both files, to compare with datasets_read."""
    for split in ROWS:
        for _ in prepare.read_folder(folder / "source")(f"{split}.npy"):
            pass


def datasets_read(folder: Path) -> None:
    """The same with `datasets`, streaming, in Arrow's format; its import counts, as in a command."""
    import datasets

    for split in ROWS:
        file = str(folder / "source" / f"{split}-00000-of-00001.parquet")
        stream = datasets.load_dataset("parquet", data_files=[file], split="train", streaming=True).with_format("arrow")
        for table in stream.iter(batch_size=32):
            for name in ("input_ids", "labels"):
                table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def plain_open(folder: Path) -> None:
    for split in ROWS:
        np.load(folder / "plain" / f"{split}.npy", allow_pickle=True)[0]["input_ids"]


def our_open(folder: Path) -> None:
    for split, rows in ROWS.items():
        packed.open_split(folder / "ours" / f"{split}.npy", S, LLAMA2_70B.vocab, rows)[0]["input_ids"]


def our_map(folder: Path) -> None:
    for split in ROWS:
        np.load(folder / "ours" / f"{split}.npy", mmap_mode="r")[0]["input_ids"]


def report(best: dict[Callable[[Path], None], Cost], folder: Path) -> None:
    def row(name: str, plain: float, ours: float, unit: str) -> None:
        print(f"{name:<32}{plain:>10,.4g} {unit:<4}{ours:>10,.3g} {unit:<4}{plain / ours:>10,.3g} x")

    def file_mb(way: str) -> float:
        return sum((folder / way / f"{split}.npy").stat().st_size for split in ROWS) / 1e6

    print(f"\n{'':<32}{'plain':>10} {'':<4}{'ours':>10} {'':<4}{'ratio':>10}")
    row("convert", best[plain_convert].seconds, best[our_convert].seconds, "s")
    row("convert, CPU", best[plain_convert].cpu_seconds, best[our_convert].cpu_seconds, "s")
    row("convert, peak memory", best[plain_convert].peak_mib, best[our_convert].peak_mib, "MiB")
    print(f"\n{'':<32}{'datasets':>10} {'':<4}{'ours':>10} {'':<4}{'ratio':>10}")
    row("read parquet, CPU", best[datasets_read].cpu_seconds, best[our_read].cpu_seconds, "s")
    row("read parquet, peak memory", best[datasets_read].peak_mib, best[our_read].peak_mib, "MiB")
    print(f"\n{'':<32}{'plain':>10} {'':<4}{'ours':>10} {'':<4}{'ratio':>10}")
    row("file size", file_mb("plain"), file_mb("ours"), "MB")
    row("open, every row checked", best[plain_open].seconds, best[our_open].seconds, "s")
    row("open, unchecked", best[plain_open].seconds, best[our_map].seconds, "s")
    row("open, peak memory", best[plain_open].peak_mib, best[our_open].peak_mib, "MiB")


if __name__ == "__main__":
    main()
