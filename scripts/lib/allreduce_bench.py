#!/usr/bin/env python3
"""Measure the all-reduce bandwidth that training will get: every rank runs this, rank 0 prints one line of JSON.

    torchrun --nproc-per-node=8 --no-python scripts/run_and_time.sh scripts/lib/allreduce_bench.py

The figure is the bus bandwidth as nccl-tests defines it, 2 (n - 1) / n * bytes / seconds, so that it compares
across numbers of ranks with the links' own speed. Uses NCCL where there are GPUs and gloo where there are none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def bus_gb_per_s(ranks: int, size_bytes: int, seconds: float) -> float:
    """nccl-tests, doc/PERFORMANCE.md. In 1e9 bytes per second."""
    return 2 * (ranks - 1) / ranks * size_bytes / seconds / 1e9


def measure(size_bytes: int, repeats: int) -> float:
    """Seconds of one all-reduce, the mean of `repeats` after three to warm up."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # noqa: TID251 - torch.distributed's own protocol
    dist.init_process_group("nccl" if gpu else "gloo")
    values = torch.ones(size_bytes // 4, device="cuda" if gpu else "cpu")
    start = 0.0
    for step in range(-3, repeats):
        if step == 0:
            dist.barrier()
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    if gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeats
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        result = {
            "bus_gb_per_s": round(bus_gb_per_s(ranks, size_bytes, seconds), 4),
            "ranks": ranks,
            "bytes": size_bytes,
        }
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()
    return seconds


def default_mib() -> int:
    """Large enough for the links' full rate; on a CPU the measurement only shows that the ranks meet."""
    import torch

    return 1024 if torch.cuda.is_available() else 16


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, help="size of the reduced tensor, in MiB (default: 1024; 16 without GPUs)")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    mib = args.mib if args.mib is not None else default_mib()
    if mib < 1 or args.repeats < 1:
        print("error: --mib and --repeats must be at least 1", file=sys.stderr)
        return 2
    measure(mib * 2**20, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
