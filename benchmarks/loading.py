#!/usr/bin/env python3
"""Rows on their way into a step: our data module against NeMo's GPTSFTPackedDataset on the same rows.

    python benchmarks/loading.py [--rows 800] [--batches 200] [--runs 3]

Rows of 8,192 tokens are made up and written in both formats: ours, and what NeMo packs (a pickled array of dicts of lists). A
loader of one rank, without worker processes, then gives micro batches of one row in a shuffled order, as training takes them,
up to the host's tensors. Every measurement is a process of its own, both ways take turns, and the best run counts. Memory is
what opening and reading add to interpreter and imports: ours are pages of the file, which all ranks of a node share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from llama2_lora.config import rules  # noqa: E402
from llama2_lora.data import inspection, packed  # noqa: E402
from llama2_lora.llama2 import LLAMA2_70B  # noqa: E402

S, VOCAB = rules.SEQUENCE_LENGTH, LLAMA2_70B.vocab


class Cost(NamedTuple):
    open_seconds: float  # of CPU time, until the first batch is there
    seconds: float  # on the clock, of all batches but the first
    cpu_seconds: float
    memory_mib: float


def make_rows(folder: Path, rows: int) -> None:
    """The same rows in both formats; half of each is scored."""
    ids_NS = np.random.default_rng(rows).zipf(1.3, (rows, S)).clip(3, VOCAB - 1).astype(np.uint16)
    mask_NS = np.ones_like(ids_NS, dtype=np.uint8)
    mask_NS[:, : S // 2] = 0
    (folder / "ours").mkdir()
    for name, rows_of_split in packed.SPLITS.items():  # the validation split is opened with the other, as in a run
        packed.write_split(folder / "ours" / name, ids_NS[:rows_of_split], mask_NS[:rows_of_split])
    packed.write_manifest(folder / "ours", S, VOCAB, "made up", "none")
    samples = [
        {"input_ids": ids_S.tolist(), "loss_mask": mask_S.tolist(), "seq_start_id": [0]}
        for ids_S, mask_S in zip(ids_NS, mask_NS, strict=True)
    ]
    np.save(folder / "nemo.npy", samples)


def our_batches(folder: Path, order: np.ndarray) -> Iterator[Any]:
    from nemo.lightning.data import WrappedDataLoader

    from llama2_lora.training.data import PackedRows, Splits, micro_batches

    yield None  # what is imported does not count
    expected = inspection.expected(folder / "ours", S, VOCAB, gpu=False)
    rows = PackedRows(Splits(folder / "ours", expected, S, VOCAB), "train", "nvidia")
    yield from WrappedDataLoader(mode="train", dataset=rows, batch_sampler=micro_batches(order, 0, 1, 1), num_workers=0)


def nemo_batches(folder: Path, order: np.ndarray) -> Iterator[Any]:
    from nemo.collections.llm.gpt.data.core import GPTSFTPackedDataset
    from nemo.lightning.data import WrappedDataLoader

    yield None
    tokenizer = SimpleNamespace(eos_id=2)  # all that it asks of one
    template = dict(prompt_template="{text} {answer}", truncation_field="text")  # asked for, though packed rows need none
    rows = GPTSFTPackedDataset(str(folder / "nemo.npy"), tokenizer, max_seq_length=S, pad_to_max_length=True, **template)
    yield from WrappedDataLoader(
        mode="train", dataset=rows, batch_sampler=order.reshape(-1, 1).tolist(), collate_fn=rows.collate_fn, num_workers=0
    )


def cost(way: Callable[[Path, np.ndarray], Iterator[Any]], folder: Path, order: np.ndarray) -> Cost:
    batches = way(folder, order)
    next(batches)
    before, cpu_started = peak_mib(), time.process_time()
    next(batches)
    started, cpu_first = time.perf_counter(), time.process_time()
    for batch in batches:
        assert batch["tokens"].shape[0] == 1
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_first
    return Cost(cpu_first - cpu_started, seconds, cpu_seconds, peak_mib() - before)


def peak_mib() -> float:
    """Of this process alone: getrusage would count the parent of a spawned one, too."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def report(nemo: Cost, ours: Cost, rows: int, batches: int) -> None:
    def row(name: str, theirs: float, ours: float, unit: str, more_is_better: bool = False) -> None:
        ratio = ours / theirs if more_is_better else theirs / ours
        print(f"{name:<32}{theirs:>12,.4g} {unit:<5}{ours:>12,.4g} {unit:<5}{ratio:>8,.3g} x")

    rates = [(batches - 1) / seconds for seconds in (nemo.seconds, ours.seconds, nemo.cpu_seconds, ours.cpu_seconds)]
    print(f"{f'{rows} rows of {S:,} tokens':<32}{'NeMo':>12} {'':<5}{'ours':>12} {'':<5}{'better':>10}")
    row("open, CPU", nemo.open_seconds, ours.open_seconds, "s")
    row("samples per second", *rates[:2], "1/s", more_is_better=True)
    row("samples per second of CPU", *rates[2:], "1/s", more_is_better=True)
    row("memory of a rank", nemo.memory_mib, ours.memory_mib, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800, help="of the training split; the real one has 3,901")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    order = np.random.default_rng(0).permutation(arguments.rows)[: arguments.batches]
    found: dict[Any, list[Cost]] = {nemo_batches: [], our_batches: []}
    with tempfile.TemporaryDirectory() as name:
        make_rows(Path(name), arguments.rows)
        for _ in range(arguments.runs):
            for way, costs in found.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    costs.append(pool.apply(cost, (way, Path(name), order)))
    best = [Cost(*map(min, zip(*costs, strict=True))) for costs in found.values()]
    report(*best, arguments.rows, len(order))


if __name__ == "__main__":
    main()
