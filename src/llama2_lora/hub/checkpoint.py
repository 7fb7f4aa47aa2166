"""A NeMo checkpoint from a repository on the hub: context/ and weights/, in a folder that is complete or has no weights/.

    MODEL_DIR/context/  MODEL_DIR/weights/  MODEL_DIR/.manifest.json (what the hub listed: files, sizes, hashes)

Files arrive in MODEL_DIR/.download and move to their places once all sizes and hashes are the hub's. A folder that is
complete is verified against its manifest, without a network.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from llama2_lora import files
from llama2_lora.hub import client, pieces
from llama2_lora.hub.client import RemoteFile
from llama2_lora.hub.failures import HubError, Repository

MANIFEST = ".manifest.json"
STAGING = ".download"
PARTS = ("context", "weights")  # weights last: where it is, all is there


def fetch(asked: Repository, model_dir: Path) -> None:
    """Bring the checkpoint to `model_dir`, or verify the one that is there; says on stdout what it does. OSError, with one
    sentence, where that fails."""
    started = time.monotonic()
    repository, listed = (
        remembered(model_dir / MANIFEST, asked)
        or remembered(model_dir / STAGING / MANIFEST, asked)  # a call that was stopped: the branch may have moved on since
        or client.list_files(asked, [f"{part}/*" for part in PARTS])
    )
    for needed in ("context/io.json", "weights/metadata.json"):
        if needed not in (file.path for file in listed):
            raise HubError(f"{repository.id} holds no NeMo checkpoint: it has no {needed}")
    total = sum(file.bytes for file in listed)
    print(f"{repository.id} at {repository.revision}: {len(listed)} files, {total / 1e9:.1f} GB", flush=True)
    print(f"pin it: --repository {repository.id} --revision {repository.revision}", flush=True)
    if (model_dir / PARTS[-1]).exists():
        verify_present(model_dir, listed, PARTS)
    else:
        with files.lock(model_dir / ".lock"):
            there = [part for part in PARTS if (model_dir / part).exists()]
            verify_present(model_dir, listed, there)
            remember(model_dir / STAGING / MANIFEST, asked, repository.revision, listed)
            bring([file for file in listed if _part(file) not in there], repository, model_dir)
    remember(model_dir / MANIFEST, asked, repository.revision, listed)
    print(f"{model_dir}: complete, every size and hash is the hub's ({time.monotonic() - started:.0f} s)")


def remembered(path: Path, asked: Repository) -> tuple[Repository, list[RemoteFile]] | None:
    """What the hub listed of the same repository and revision in an earlier call; None where no whole manifest says so."""
    try:
        manifest = json.loads(path.read_text())
        same = manifest["repository"] == asked.id and asked.revision in (manifest["asked"], manifest["commit"])
        listed = [RemoteFile(str(name), int(size), str(digest)) for name, size, digest in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if any(file.path.split("/")[0] not in PARTS or ".." in file.path.split("/") for file in listed):
        return None
    return (asked._replace(revision=manifest["commit"]), listed) if same else None


def remember(path: Path, asked: Repository, commit: str, listed: Sequence[RemoteFile]) -> None:
    """Write a manifest, unless it is there: the folder may be on a read-only mount by now."""
    if remembered(path, asked) is None:
        manifest = {"repository": asked.id, "asked": asked.revision, "commit": commit, "files": listed}
        with files.new_file(path) as file:
            file.write(json.dumps(manifest, indent=1).encode())


def verify_present(model_dir: Path, listed: Sequence[RemoteFile], parts: Sequence[str]) -> None:
    """HubError where a part of the checkpoint that is in its place is not the repository's."""
    plain, split = pieces.find([file for file in listed if _part(file) in parts])
    copies = [client.Copy(file, model_dir / file.path) for file in plain]
    copies += [copy for file in split for copy in file.copies(model_dir)]
    if problems := client.verify(copies):
        more = f"; and {len(problems) - 1} more" if problems[1:] else ""
        raise HubError(f"{problems[0]}{more}: remove {model_dir}'s context and weights, or choose another --model_dir")


def bring(listed: Sequence[RemoteFile], repository: Repository, model_dir: Path) -> None:
    """Download these files and move their parts to their places."""
    staging = model_dir / STAGING
    plain, split = pieces.find(listed)
    missing = plain + [piece for file in split for piece in file.missing(staging)]
    largest_piece = max((piece.bytes for file in split for piece in file.pieces), default=0)
    client.download(repository, missing, staging, spare_bytes=largest_piece)
    for file in split:
        file.join(staging)
        if problems := client.verify(file.copies(staging)):
            (staging / file.path).unlink()
            raise HubError(f"{problems[0]}; the file was removed: run the command again")
    expected = {file.path: file.bytes for file in plain} | {file.path: file.bytes for file in split}
    _keep_only(staging, expected)
    files.move_into(model_dir, staging, [part for part in PARTS if (staging / part).exists()])


def _part(file: RemoteFile) -> str:
    return file.path.split("/")[0]


def _keep_only(staging: Path, expected: dict[str, int]) -> None:
    """Delete what an earlier call brought of another revision; HubError where a file has gone or has another size now.

    A last look before the parts get their names: what was verified an hour ago may have been deleted since.
    """
    for part in PARTS:
        for path in (staging / part).rglob("*"):
            if path.is_file() and path.relative_to(staging).as_posix() not in expected:
                path.unlink()
    for name, size in expected.items():
        path = staging / name
        if not path.is_file() or path.stat().st_size != size:
            raise HubError(f"{path} was changed or removed while the others came: run the command again")
