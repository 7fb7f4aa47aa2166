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
import sys
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from llama2_lora.data import prepare


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
            prepare.check(data_dir)
        elif arguments.export_pickle:
            prepare.export_pickles(data_dir, arguments.export_pickle)
        elif arguments.import_pickle:
            prepare.import_pickles(arguments.source or data_dir, data_dir)
        elif arguments.source:
            prepare.convert(prepare.read_folder(arguments.source), data_dir, str(arguments.source), "unknown")
        else:
            prepare.fetch(data_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run the command again, it continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
