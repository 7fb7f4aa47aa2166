"""Downloads from the Hugging Face hub: resumed, retried and verified by hash. What can fail, and its words: failures.py.

huggingface_hub moves the bytes, so HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there. What it
leaves to its callers is here: space for all files before the first byte, one progress bar, another try after a dropped
connection, and hashes (it compares sizes only). No message carries a token or a URL, which may be a signed one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import huggingface_hub
import requests
from huggingface_hub import errors
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm

from llama2_lora.hub.failures import HubError, Repository, explain, limit_redirects, retried

GIB = 1 << 30
WORKERS = 8  # files at a time
LIST_TRIES = 4  # of a listing: seven seconds in all

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    path: str  # inside the repository
    bytes: int
    digest: str  # sha256 of an LFS file, git's blob hash (sha1) of any other; "" where unknown


class Copy(NamedTuple):
    """Where a remote file's bytes lie here: a file of their own, or from byte `offset` of one joined from pieces."""

    file: RemoteFile
    path: Path
    offset: int | None = None

    def problem(self) -> str | None:
        """What is wrong with it; None where size and hash are the hub's."""
        name, length, digest = self.file
        if not self.path.is_file():
            return f"{self.path} is missing"
        size = self.path.stat().st_size
        if self.offset is None and size != length:
            return f"{self.path} has {size} bytes, the hub lists {length} for {name}"
        if digest and file_digest(self.path, digest, self.offset or 0, length) != digest:
            return f"{self.path} has another hash than the hub lists for {name}"
        return None


def list_files(repository: Repository, patterns: Sequence[str]) -> tuple[Repository, list[RemoteFile]]:
    """The repository at the commit that its revision names now, and its files that match. HubError where it can't be had.

    With HF_HUB_OFFLINE=1: what lies in the cache under HF_HOME.
    """
    try:
        commit, files = retried(lambda: _list_hub(repository), tries=LIST_TRIES)
    except errors.OfflineModeIsEnabled:
        commit, files = _list_cache(repository)
    except (requests.RequestException, errors.HFValidationError, RuntimeError) as error:
        raise HubError(explain(error, repository)) from error
    matching = [file for file in files if any(fnmatch(file.path, pattern) for pattern in patterns)]
    return repository._replace(revision=commit), matching


def download(repository: Repository, files: Sequence[RemoteFile], folder: Path, spare_bytes: int = 0) -> None:
    """Bring `files` of one commit to `folder`, several at a time, and verify sizes and hashes.

    What an earlier, interrupted call left in `folder` is continued. OSError, before the first byte, where the disk does
    not hold the files and `spare_bytes` more.
    """
    hub_logging.set_verbosity_error()  # its warnings name signed URLs
    disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.bytes for file in files)
    check_space(folder, total - _arrived(files, folder) + spare_bytes)
    with _bar("downloading", total) as bar:

        def show(done: int) -> None:
            bar.set_postfix_str(f"{done} of {len(files)} files verified", refresh=False)
            bar.update(min(_arrived(files, folder), total) - bar.n)

        for _ in in_threads(lambda file: _fetch(repository, file, folder), files, show):
            pass


def download_into_cache(repository: Repository, files: Sequence[RemoteFile]) -> Path:
    """Bring `files` of one commit into the hub's cache, where they are shared with other programs; returns their folder."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not isinstance(_cached(repository, file), str)]
    check_space(cache, sum(file.bytes for file in missing))
    hub_logging.set_verbosity_error()
    disable_progress_bars()
    before = bytes_in(cache)
    total = sum(file.bytes for file in missing)
    with _bar(f"downloading into {cache}", total) as bar:

        def show(done: int) -> None:
            bar.set_postfix_str(f"{done} of {len(missing)} files", refresh=False)
            bar.update(min(bytes_in(cache) - before, total) - bar.n)

        for _ in in_threads(lambda file: _fetch_into_cache(repository, file, cache), missing, show):
            pass
    return Path(huggingface_hub.snapshot_download(repository.id, revision=repository.revision, local_files_only=True))


def verify(copies: Sequence[Copy]) -> list[str]:
    """What is wrong with these copies, each read to its end."""
    with _bar("verifying", sum(copy.file.bytes for copy in copies)) as bar:

        def check(copy: Copy) -> str | None:
            problem = copy.problem()
            bar.update(copy.file.bytes)
            return problem

        return [problem for problem in in_threads(check, copies) if problem]


def check_space(folder: Path, needed_bytes: int) -> None:
    """OSError where the file system of `folder` has less than `needed_bytes` free. Quotas are not seen."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise OSError(
            f"{folder} has {free / GIB:.1f} GiB free, {needed_bytes / GIB:.1f} GiB more are needed: "
            "free some, or choose a folder on a larger disk"
        )


def bytes_in(folder: Path) -> int:
    """Bytes of all files below `folder`, those that are still arriving included."""
    return sum(map(_size, folder.rglob("*")))


def file_digest(path: Path, like: str, offset: int, length: int) -> str:
    """sha256 of `length` bytes from `offset` where `like` is one, else git's blob hash."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
    with path.open("rb") as file:
        file.seek(offset)
        while length > 0 and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], show: Callable[[int], None] = lambda done: None
) -> Iterator[Result]:
    """Results of `work` on all items, in any order; calls `show(number done)` a few times a second.

    The threads are daemons: an error or Ctrl-C ends the process at once, not after the files that are on their way.
    """
    done = 0
    with ThreadPool(WORKERS) as pool:
        waiting = [pool.apply_async(work, (item,)) for item in items]
        while waiting:
            waiting[0].wait(0.2)
            ready = [job for job in waiting if job.ready()]
            waiting = [job for job in waiting if job not in ready]
            results = [job.get() for job in ready]
            done += len(results)
            show(done)
            yield from results


def _bar(what: str, total: int) -> tqdm:
    seconds = 1 if sys.stderr.isatty() else 30  # a log file needs few lines
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, mininterval=seconds)


def _list_hub(repository: Repository) -> tuple[str, list[RemoteFile]]:
    limit_redirects()
    api = huggingface_hub.HfApi()
    commit = str(api.repo_info(repository.id, revision=repository.revision, repo_type=repository.type).sha)
    tree = api.list_repo_tree(repository.id, recursive=True, revision=commit, repo_type=repository.type)
    files = [
        RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in tree
        if isinstance(entry, huggingface_hub.hf_api.RepoFile)
    ]
    return commit, files


def _list_cache(repository: Repository) -> tuple[str, list[RemoteFile]]:
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository.id, revision=repository.revision, repo_type=repository.type, local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        raise HubError(
            f"HF_HUB_OFFLINE=1 is set, and {repository.type} {repository.id} at {repository.revision} is not in the cache: "
            "unset it, or set HF_HOME to the folder that has it"
        ) from None
    folder = Path(snapshot)
    files = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = path.resolve().name  # the cache names a file by its hash
        digest = blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else ""
        files.append(RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size, digest))
    return folder.name, files


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # renamed since it was listed
        return 0


def _arrived(files: Sequence[RemoteFile], folder: Path) -> int:
    """Bytes of these files in `folder`: the whole ones, and those on their way, which the hub's library keeps in .cache."""
    return sum(_size(folder / file.path) for file in files) + bytes_in(folder / ".cache")


def _fetch(repository: Repository, file: RemoteFile, folder: Path) -> None:
    """One file, whole and verified; a wrong hash is tried once more from the start."""
    copy = Copy(file, folder / file.path)
    problem = copy.problem()
    for from_start in (False, True):
        if problem is None:
            return
        copy.path.unlink(missing_ok=True)
        _fetch_bytes(repository, file, folder, from_start)
        problem = copy.problem()
    if problem:
        copy.path.unlink(missing_ok=True)
        raise HubError(f"{problem}, twice: the repository or a proxy is damaged; the file was removed")


def _fetch_bytes(repository: Repository, file: RemoteFile, folder: Path, from_start: bool) -> None:
    """One file, not verified: tried again while bytes keep coming, and a few times where none do."""
    starts = iter([from_start])  # a second try goes on from what the first one brought
    try:
        retried(
            lambda: _fetch_once(repository, file, folder, next(starts, False)),
            arrived=lambda: _arrived([file], folder),
        )
    except (OSError, RuntimeError) as error:
        raise HubError(explain(error, repository)) from error


def _fetch_into_cache(repository: Repository, file: RemoteFile, cache: Path) -> None:
    def once() -> None:
        limit_redirects()
        huggingface_hub.hf_hub_download(repository.id, file.path, revision=repository.revision)

    try:
        retried(once, arrived=lambda: bytes_in(cache))
    except (OSError, RuntimeError) as error:
        raise HubError(explain(error, repository)) from error


def _cached(repository: Repository, file: RemoteFile) -> object:
    """Its path in the hub's cache, or what else the hub's library gives where it is not there."""
    name, revision, type = repository
    return huggingface_hub.try_to_load_from_cache(name, file.path, revision=revision, repo_type=type)


def _fetch_once(repository: Repository, file: RemoteFile, folder: Path, from_start: bool) -> None:
    limit_redirects()
    name, revision, type = repository
    cached = _cached(repository, file)
    if isinstance(cached, str) and not from_start:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cached, path)
    else:
        huggingface_hub.hf_hub_download(
            name, file.path, revision=revision, repo_type=type, local_dir=folder, force_download=from_start
        )
