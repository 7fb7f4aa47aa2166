#!/usr/bin/env python3
"""Pre-train the rehearsal's base model: a small Llama that has read reports, but no summary. About 75 s on two cores.

OUT/{config.json,model.safetensors,tokenizer.json,...}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama2_lora.rehearsal import base_model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder that rehearsal_data.py made")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder of the model")
    parser.add_argument("--steps", type=int, default=base_model.STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first weights and the order (default: 1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        made = base_model.make(args.data, args.output, args.steps, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {f'{args.steps} steps of {base_model.ROWS} rows' if made else 'is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
