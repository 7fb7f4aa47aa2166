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
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llama2_lora.hub import client, pieces

REPOSITORY = "michal1270/llama2_70b_nemo_zarr"  # what NVIDIA's submissions start from
MANIFEST = ".manifest.json"
PARTS = ("context", "weights")  # weights last: where it is, all is there


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
        fetch(client.Repository(arguments.repository, arguments.revision), arguments.model_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run the command again, it continues", file=sys.stderr)
        return 130
    return 0


def fetch(repository: client.Repository, model_dir: Path) -> None:
    """Bring the checkpoint to `model_dir`, or verify the one that is there."""
    started, asked = time.monotonic(), repository
    repository, files = remembered(model_dir, asked) or client.list_files(asked, [f"{part}/*" for part in PARTS])
    for needed in ("context/io.json", "weights/metadata.json"):
        if needed not in (file.path for file in files):
            raise client.HubError(f"{repository.id} holds no NeMo checkpoint: it has no {needed}")
    total = sum(file.bytes for file in files)
    print(f"{repository.id} at {repository.revision}: {len(files)} files, {total / 1e9:.1f} GB", flush=True)
    there = [part for part in PARTS if (model_dir / part).exists()]
    if there:
        verify_present(model_dir, [file for file in files if file.path.split("/")[0] in there])
    if "weights" not in there:
        bring([file for file in files if file.path.split("/")[0] not in there], repository, model_dir)
    remember(model_dir, asked, repository.revision, files)
    print(f"{model_dir}: complete, every size and hash is the hub's ({time.monotonic() - started:.0f} s)")


def remembered(model_dir: Path, asked: client.Repository) -> tuple[client.Repository, list[client.RemoteFile]] | None:
    """The hub's list of a finished download of the same repository and revision; None where there is none."""
    try:
        manifest = json.loads((model_dir / MANIFEST).read_text())
        same = manifest["repository"] == asked.id and asked.revision in (manifest["asked"], manifest["commit"])
        files = [client.RemoteFile(*entry) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (asked._replace(revision=manifest["commit"]), files) if same else None


def remember(model_dir: Path, asked: client.Repository, commit: str, files: list[client.RemoteFile]) -> None:
    manifest = {"repository": asked.id, "asked": asked.revision, "commit": commit, "files": files}
    partial = model_dir / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    partial.replace(model_dir / MANIFEST)


def verify_present(model_dir: Path, files: list[client.RemoteFile]) -> None:
    """HubError where a part of the checkpoint that is in its place is not the repository's."""
    plain, split = pieces.find(files)
    copies = [client.Copy(file, model_dir / file.path) for file in plain]
    copies += [copy for file in split for copy in file.copies(model_dir)]
    if problems := client.verify(copies):
        more = f"; and {len(problems) - 1} more" if problems[1:] else ""
        raise client.HubError(f"{problems[0]}{more}: remove {model_dir}'s context and weights, or choose another --model_dir")


def bring(files: list[client.RemoteFile], repository: client.Repository, model_dir: Path) -> None:
    staging = model_dir / ".download"
    plain, split = pieces.find(files)
    missing = plain + [piece for file in split for piece in file.missing(staging)]
    largest_piece = max((piece.bytes for file in split for piece in file.pieces), default=0)
    client.download(repository, missing, staging, spare_bytes=largest_piece)
    for file in split:
        file.join(staging)
        if problems := client.verify(file.copies(staging)):
            (staging / file.path).unlink()
            raise client.HubError(f"{problems[0]}; the file was removed: run the command again")
    remove_others(staging, {staging / file.path for file in plain} | {staging / file.path for file in split})
    for part in PARTS:
        if (staging / part).exists():
            (staging / part).rename(model_dir / part)
    shutil.rmtree(staging)


def remove_others(folder: Path, keep: set[Path]) -> None:
    """Delete what an earlier call brought of another revision."""
    for part in PARTS:
        for path in (folder / part).rglob("*"):
            if path.is_file() and path not in keep:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
