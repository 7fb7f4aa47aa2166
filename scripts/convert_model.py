#!/usr/bin/env python3
"""Convert Llama-2-70B from Hugging Face's format to NeMo's, the one that training starts from.

    python scripts/convert_model.py --output_path /data/model

The weights are copied piece by piece: no GPU, no NeMo, and less than 100 MB of memory (--format torch_dist: 1 GB). A call
that was stopped is continued by the next one; OUTPUT/weights is there only when it is complete. The source is a folder with
config.json, the tokenizer and the weights, or a repository on the hub: files that lie under HF_HOME already are used, others
are downloaded with the token in HF_TOKEN, whose account must have been granted access.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import huggingface_hub
from tqdm import tqdm

from llama2_lora import hub
from llama2_lora.convert import PARTIAL, convert, verify
from llama2_lora.huggingface import HFModel
from llama2_lora.layouts import LAYOUTS

SOURCE = "meta-llama/Llama-2-70b-hf"
PATTERNS = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.index.json")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that the repository has


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder of the NeMo checkpoint")
    parser.add_argument("--source", default=SOURCE, help="folder, or repository on the hub (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a repository (default: %(default)s)")
    parser.add_argument(
        "--format", choices=LAYOUTS, default="zarr", help="format of weights/; training reads both (default: %(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="then read both sides back and compare every tensor")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    output = arguments.output_path
    try:
        source = open_source(arguments.source, arguments.revision)
        size = source.weight_bytes()
        print(f"source: {source.folder}, {source.shape.parameters():,} weights in {source.dtype}, {size / 1e9:.1f} GB")
        output.mkdir(parents=True, exist_ok=True)
        hub.check_space(output, size - hub.bytes_in(output / PARTIAL) if not (output / "weights").exists() else 0)
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


def open_source(source: str, revision: str) -> HFModel:
    """A folder, or a repository: from the hub's cache where that has all of it, else downloaded into it."""
    if Path(source).is_dir():
        return HFModel(Path(source))
    try:
        cached = huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True)
        return HFModel(Path(cached), source)
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.LocalEntryNotFoundError, ValueError):
        return HFModel(download(hub.Repository(source, revision)), source)


def download(repository: hub.Repository) -> Path:
    """Bring what is needed of a repository into the hub's cache; returns the snapshot's folder."""
    repository, files = hub.list_files(repository, (*PATTERNS, *WEIGHTS))
    for kind in WEIGHTS:
        weights = [file for file in files if Path(file.path).match(kind)]
        if weights:
            break
    others = [file for file in files if not any(Path(file.path).match(kind) for kind in WEIGHTS)]
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    here = [huggingface_hub.try_to_load_from_cache(repository.id, f.path, revision=repository.revision) for f in weights]
    hub.check_space(cache, sum(file.bytes for file, path in zip(weights, here, strict=True) if not isinstance(path, str)))
    names = [file.path for file in (*others, *weights)]
    print(f"downloading {repository.id} at {repository.revision}: {sum(f.bytes for f in weights) / 1e9:.1f} GB into {cache}")
    try:
        return Path(huggingface_hub.snapshot_download(repository.id, revision=repository.revision, allow_patterns=names))
    except OSError as error:
        raise hub.HubError(hub.explain(error, repository)) from error


if __name__ == "__main__":
    sys.exit(main())
