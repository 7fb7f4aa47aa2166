#!/usr/bin/env python3
"""Convert Llama-2-70B from Hugging Face's format to NeMo's, the one that training starts from.

    python scripts/convert_model.py --output_path /data/model

The weights are copied piece by piece: no GPU, no NeMo, and less than 100 MB of memory (torch_dist: 1.4 GB). A call
that was stopped is continued by the next one; OUTPUT/weights is there only when it is complete. The source is a folder with
config.json, the tokenizer and the weights, or a repository on the hub: files that lie under HF_HOME already are used, others
are downloaded with the token in HF_TOKEN, whose account must have been granted access.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from tqdm import tqdm

    from llama2_lora.hub import client
    from llama2_lora.weights.convert import STAGING, convert, verify
    from llama2_lora.weights.formats import LAYOUTS
    from llama2_lora.weights.huggingface import BASE, open_model

DTYPES = {"bf16": "BF16", "fp32": "F32"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder of the NeMo checkpoint")
    parser.add_argument("--source", default=BASE, help="folder, or repository on the hub (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a repository (default: %(default)s)")
    parser.add_argument(
        "--format", choices=LAYOUTS, default="zarr", help="format of weights/; training reads both (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights; must be training's, bf16 on GPUs and fp32 on a CPU (default: bf16, or fp32 if the source is)",
    )
    parser.add_argument("--verify", action="store_true", help="then read both sides back and compare every tensor")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    output = arguments.output_path
    try:
        source = open_model(arguments.source, arguments.revision)
        # Llama-2 comes in fp16, which no training uses.
        source.dtype = DTYPES[arguments.dtype or ("fp32" if source.stored_dtype == "F32" else "bf16")]
        size = source.weight_bytes()
        print(f"source: {source.folder}, {source.shape.parameters():,} weights in {source.stored_dtype}")
        if source.folder.parent.name == "snapshots":  # of the hub's cache
            print(f"pin it: --source {arguments.source} --revision {source.folder.name}")
        print(f"output: {output}, {arguments.format}, {source.dtype}, {size / 1e9:.1f} GB")
        output.mkdir(parents=True, exist_ok=True)
        client.check_space(output, size - client.bytes_in(output / STAGING) if not (output / "weights").exists() else 0)
        started = time.monotonic()
        with progress("convert", size) as bar:
            new = convert(source, output, arguments.format, bar.update)
        print(f"{output}: written in {time.monotonic() - started:.0f} s" if new else f"{output}: is up to date")
        if arguments.verify:
            with progress("verify", size) as bar:
                verify(source, output, bar.update)
            print(f"{output}: every tensor equals the source's")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def progress(what: str, size: int) -> tqdm:
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, mininterval=1, disable=None)  # None: on terminals only


if __name__ == "__main__":
    sys.exit(main())
