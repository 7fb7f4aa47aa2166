#!/usr/bin/env python3
"""Convert Llama-2-70B from Hugging Face's format to NeMo's, the one that training starts from.

    python scripts/convert_model.py --output_path /data/model

The weights are copied piece by piece: no GPU, no NeMo, and less than 100 MB of memory (zarr). A call that was stopped is
continued by the next one; OUTPUT/weights exists only once it is complete. The source is a repository on the hub (HF_TOKEN of
an account with access, or HF_HOME with the files already there) or a folder with config.json, the tokenizer and the weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from tqdm import tqdm

from llama2_lora.convert import FORMATS, convert, weight_bytes
from llama2_lora.huggingface import HFModel

SOURCE = "meta-llama/Llama-2-70b-hf"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder of the NeMo checkpoint")
    parser.add_argument("--source", default=SOURCE, help="repository on the hub, or folder (default: %(default)s)")
    parser.add_argument(
        "--format", choices=FORMATS, default="zarr", help="format of weights/; Megatron loads both (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        source = HFModel(Path(arguments.source))
        started, total = time.monotonic(), weight_bytes(source)
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting", mininterval=1) as bar:
            new = convert(source, arguments.output_path, arguments.format, bar.update)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if new:
        print(f"{arguments.output_path}: {total / 1e9:.1f} GB in {time.monotonic() - started:.0f} s")
    else:
        print(f"{arguments.output_path}: is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
