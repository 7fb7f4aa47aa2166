"""A file or folder appears whole or not at all: the one module through which the project makes what others read.

    with new_file(path) as file: ...        a file, written beside its name and renamed when it is whole and on disk
    with new_folder(folder) as new: ...     a folder, the same
    with lock(folder / ".lock"): ...        one process at a time; a second one is told who is there
    move_into(folder, staging, names)       what a long, resumable call has made in a subfolder, in an order that is safe

All but `staging`, which is there to be continued, is gone when a block ends with an error. A process that is killed leaves one
hidden `.NAME.partial` behind, which the next call writes over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

RECIPE = "recipe.txt"  # in a folder: what it was made from
# What file systems answer that know no locks: Lustre without -o flock, NFS without a lock daemon.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Locked(OSError):
    """Another process is at work there; the message names it."""


@contextmanager
def new_file(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path`, and the place of an older one, when the block ends without an error.

    Makes the folder above it. sync=False leaves it to the caller to `flush` what he has made, once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, recipe: str | None = None, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the block ends without an error.

    Where something stands under that name: an empty folder is taken; with `recipe`, which is kept in the folder, one that an
    older recipe made is replaced; with `replace`, any folder is. ValueError where something else stands there, Locked where
    another process makes the same folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f".{folder.name}.lock")):
        if recipe is not None:
            is_up_to_date(folder, recipe)
        elif not replace and _is_taken(folder):
            raise ValueError(f"{folder} is there already: remove it, or choose another folder")
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if recipe is not None:
                (partial / RECIPE).write_text(recipe)
            flush(partial)
            _take_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_up_to_date(folder: Path, recipe: str) -> bool:
    """Whether this recipe made the folder. ValueError where something else did, for new_folder would delete it."""
    try:
        return (folder / RECIPE).read_text() == recipe
    except FileNotFoundError:
        if _is_taken(folder):
            raise ValueError(f"{folder} holds something else: choose a new folder, or remove it") from None
        return False


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the file `path` as a lock, which names this process and is gone afterwards. Locked where another one holds it.

    The kernel releases the lock of a process that was killed, whatever file it leaves behind.
    """
    descriptor = _acquire(Path(path))
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)
        yield
    finally:
        Path(path).unlink(missing_ok=True)  # while it is held: another process then locks a new file
        os.close(descriptor)


def move_into(folder: Path, staging: Path, names: Sequence[str]) -> None:
    """Move finished parts from `staging`, a subfolder of `folder`, to their places, and remove it.

    In the order given: the last part makes the folder complete. Older folders of these names leave first, the last part's
    before all others, so that no moment shows a complete folder of parts that do not belong together.
    """
    flush(staging)
    for name in reversed(names):
        if (folder / name).is_dir():
            old = staging / f"old_{name}"
            shutil.rmtree(old, ignore_errors=True)
            (folder / name).rename(old)
    for name in names:
        (staging / name).replace(folder / name)
    shutil.rmtree(staging)


def flush(folder: Path) -> None:
    """Wait until all of a folder is on disk, so that not even a crash of the node leaves one that only looks complete."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_plain_name(name: str) -> bool:
    """Whether a name that stands in somebody's file is one of a file beside it: no path, no folder, nothing too long."""
    return (
        bool(name)
        and name not in (".", "..")
        and "/" not in name
        and "\0" not in name
        and len(name.encode(errors="replace")) < 256
    )


def _partial(path: Path) -> Path:
    """Where something is written before it takes its name: always the same, so a killed run leaves at most one behind.

    Hidden, since whatever stands in the folder of a zarr array counts as a chunk.
    """
    return path.with_name(f".{path.name}.partial")


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _take_place(partial: Path, folder: Path) -> None:
    """Rename; an older folder goes only when the new one has its name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if _is_taken(folder):
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _acquire(path: Path) -> int:
    """Descriptor of the locked file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_the_file(descriptor, path):
                return descriptor
            os.close(descriptor)  # its holder has removed it in the meantime: a lock on nothing
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise Locked(f"{path.parent} is being written by {holder}: wait until it has ended, or end it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"warning: the file system of {path.parent} has no locks: let no second process write there", file=sys.stderr)
            return descriptor


def _is_the_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
