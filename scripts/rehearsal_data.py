#!/usr/bin/env python3
"""Make the rehearsal's data: a small corpus of GovReport's shape, in the files that the real data set uses.

The documents are generated reports with summaries. `--text DIR` takes your own English text instead: NAME.txt with its
summary in NAME.summary.txt; where that is missing, the paragraphs of NAME.txt are gathered into documents of about one row,
and the last paragraph of each serves as its summary.

    OUT/gov_report/{train.npy,validation.npy,manifest.json}   what DATADIR points at
    OUT/tokenizer/                                            byte-level BPE, loads with transformers' AutoTokenizer
    OUT/base_text.npy                                         token ids that rehearsal_model.py pre-trains on
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama2_lora.rehearsal import data


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to make")
    parser.add_argument("--text", type=Path, metavar="DIR", help="folder of your own .txt files; 1 MB is enough")
    parser.add_argument("--seed", type=int, default=1, help="of the generated text, or of the split of yours (default: 1)")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens in a row, MAX_SEQLEN (default: 256)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        made = data.make(args.output, args.text, args.seed, args.sequence_length)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = ", ".join(f"{count:,} {part}" for part, count in data.rows_of(args.output).items())
    print(f"{args.output}: {rows} rows of {args.sequence_length} tokens" if made else f"{args.output}: is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
