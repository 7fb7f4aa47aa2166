#!/usr/bin/env python3
"""Download Llama-2-70B as a NeMo checkpoint, the one that training starts from.

    python scripts/download_model.py --model_dir /data/model

    /data/model/context/    io.json, model.yaml, nemo_tokenizer/: what the model is
    /data/model/weights/    138 GB in bf16

The files arrive in MODEL_DIR/.download, eight at a time, and move to their places once all sizes and hashes are the hub's.
A call that was stopped is continued by the next one. A call on a complete folder verifies it, without a network, against
what the hub listed then (MODEL_DIR/.manifest.json). Files that the repository holds in pieces (NAME.part-00,
NAME.part-01, ...) are joined. No GPU is needed.

Needs 138 GB of free disk. HF_TOKEN: token of an account that may open the repository. HF_HOME: where the hub's library
keeps token and cache; files that are in the cache are copied from there, with HF_HUB_OFFLINE=1 only those.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from llama2_lora.hub import checkpoint
    from llama2_lora.hub.failures import Repository

REPOSITORY = "michal1270/llama2_70b_nemo_zarr"  # what NVIDIA's submissions start from


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of the checkpoint; created if need be")
    parser.add_argument("--repository", default=REPOSITORY, help="model repository on the hub (default: %(default)s)")
    parser.add_argument(
        "--revision",
        default="main",
        help="commit, tag or branch; the commit that it names is printed: give that one to fetch the same files again "
        "(default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        checkpoint.fetch(Repository(arguments.repository, arguments.revision), arguments.model_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run the command again, it continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
