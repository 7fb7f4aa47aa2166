#!/usr/bin/env python3
"""Hand a trained adapter to Hugging Face's world.

    python scripts/export_adapter.py --adapter /results/adapter_SEED --output /data/peft
    python scripts/export_adapter.py --adapter /results/adapter_SEED --output /data/merged --merge

The first writes the folder that peft.PeftModel.from_pretrained loads, the second the whole model with the adapter merged
into its weights, file by file, in the dtype of the base: no GPU and no model in memory. The adapter is what a training run
with SAVE_ADAPTER=1 leaves in RESULTS_PATH/adapter_SEED, whatever its layout was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from tqdm import tqdm

    from llama2_lora.hub import client
    from llama2_lora.llama2 import LLAMA2_70B
    from llama2_lora.weights.checkpoint import read_adapter
    from llama2_lora.weights.export import merge, write_peft
    from llama2_lora.weights.huggingface import BASE, open_model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter.json and adapter.safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; it must not exist, or be empty")
    parser.add_argument("--base", default=BASE, help="base model, a folder or repository (default: %(default)s)")
    parser.add_argument("--merge", action="store_true", help="write the base with the adapter merged into its weights")
    arguments = parser.parse_args(argv)
    try:
        if arguments.merge:
            _merge(arguments.adapter, arguments.base, arguments.output)
            print(f"{arguments.output}: load it with transformers.AutoModelForCausalLM.from_pretrained")
        else:
            check_base(arguments.adapter, arguments.base)
            base = str(Path(arguments.base).resolve()) if Path(arguments.base).is_dir() else arguments.base
            write_peft(arguments.adapter, arguments.output, base)
            print(f"{arguments.output}: load it with peft.AutoPeftModelForCausalLM.from_pretrained; its base is {base}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_base(adapter: Path, base: str) -> None:
    """ValueError where the adapter of another model would be sent to the default base."""
    shape = read_adapter(adapter)[1]
    if base == BASE and shape != LLAMA2_70B:
        raise ValueError(f"{adapter}: was not trained on Llama-2-70B ({shape.layers} layers); name its base with --base FOLDER")


def _merge(adapter: Path, base: str, output: Path) -> None:
    source = open_model(base)
    output.parent.mkdir(parents=True, exist_ok=True)
    client.check_space(output.parent, source.weight_bytes())
    with tqdm(total=source.weight_bytes(), desc="merge", unit="B", unit_scale=True, mininterval=1, disable=None) as bar:
        merge(adapter, source, output, bar.update)


if __name__ == "__main__":
    sys.exit(main())
