"""Pickles of strangers, read without running anything of theirs.

A pickle is a program: it names functions, and unpickling calls them. `load` runs the program with stand-ins: every name that
the caller allows becomes a class that only notes what it was called with, any other name ends the reading. What comes back
holds plain Python values and `Recorded` ones; nothing was imported, and no array was built of the file's numbers.
"""

from __future__ import annotations

import io
import pickle
import re
import resource
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Of a file that torch.save wrote: tensors, plain containers, and what megatron/core/safe_globals.py registers as safe, less
# numpy's arrays, which can be given a state that crashes the interpreter.
TORCH_NAMES = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|types\.SimpleNamespace|pathlib\.PosixPath|_io\.BytesIO|_codecs\.encode"
    r"|torch\.(\w+Storage|Size|device|u?int\d+|b?float\d+\w*|bool|complex\d+)"
    r"|torch\.storage\.(UntypedStorage|TypedStorage)"
    r"|torch\._utils\.(_rebuild_tensor_v2|_rebuild_parameter)"
    r"|megatron\.core\.enums\.ModelType|megatron\.core\.transformer\.enums\.AttnBackend"
)
# Of the index of a torch.distributed checkpoint, `.metadata`.
INDEX_NAMES = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\."
    r"(Metadata|StorageMeta|MetadataIndex|TensorProperties|TensorStorageMetadata|ChunkStorageMetadata"
    r"|BytesStorageMetadata|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)"
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch\.MCoreMetadata"
    r"|torch\.serialization\._get_layout|torch\.(Size|u?int\d+|b?float\d+\w*|bool)"
    r"|collections\.OrderedDict|pathlib\.PosixPath"
)
# Entries of the zip file that torch.save writes. Others, such as constants.pkl, turn torch.load into another loader.
ZIP_ENTRY = re.compile(r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|(\.data|data)/\w+)")

SPARE_BYTES = 256 << 20  # of memory, beside the values of a pickle
VALUE_BYTES = 64  # that the value of one byte may take: a small number and its place in a list; an empty dict


class Recorded:
    """What a pickle would have built: `path`, MODULE.NAME, called with `arguments`, then given `state` and `items`."""

    path = ""

    def __new__(cls, *arguments: Any, **_: Any) -> Recorded:
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, []
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self.items.extend(values)

    def get(self, name: str) -> Any:
        """An attribute that the state sets; None where it sets none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def load(file: BinaryIO, allowed: re.Pattern[str]) -> Any:
    """The value of a pickle. ValueError where it is damaged, or asks for a name that `allowed` does not match."""
    reader = _Recorder(file)
    reader.allowed = allowed
    try:
        with _memory_for(file):
            return reader.load()
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except Exception as error:  # of a dozen types, whatever the opcode that met wrong bytes raises
        raise ValueError(f"it is a damaged pickle ({type(error).__name__}: {error})") from None


def check_torch_file(path: Path) -> None:
    """ValueError, which names the file, where torch.load of it could do more than to build tensors and plain values."""
    try:
        for name, content in _entries(Path(path).read_bytes()):
            if name.endswith("/data.pkl"):
                load(io.BytesIO(content), TORCH_NAMES)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def _entries(data: bytes) -> list[tuple[str, bytes]]:
    if data[:4] != b"PK\x03\x04":  # by these bytes torch.load decides; else it takes all for one pickle
        raise ValueError("it is no file of torch.save")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception as error:  # zipfile raises a dozen types on damaged archives
        raise ValueError(f"it is a damaged file of torch.save ({type(error).__name__})") from None
    names = [name for name, _ in entries]
    if len({name.casefold() for name in names}) != len(names) or not any(name.endswith("/data.pkl") for name in names):
        raise ValueError("it is a damaged file of torch.save: data.pkl must be there once")
    if unknown := [name for name in names if not ZIP_ENTRY.fullmatch(name)]:
        raise ValueError(f"it holds {unknown[0][:120]!r}, which torch.save does not write")
    return entries


@contextmanager
def _memory_for(file: BinaryIO) -> Iterator[None]:
    """No more memory for this process than the values of such a file can need.

    A pickle of ten bytes can ask for a memo of 64 GiB, which CPython fills with zeros. So it ends in a MemoryError.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + SPARE_BYTES + VALUE_BYTES * _rest_bytes(file)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _rest_bytes(file: BinaryIO) -> int:
    here = file.tell()
    size = file.seek(0, io.SEEK_END) - here
    file.seek(here)
    return size


class _Refused(Exception):
    """The pickle asks for a name that is not allowed."""


class _Recorder(pickle.Unpickler):
    allowed: re.Pattern[str]

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if not self.allowed.fullmatch(path):
            raise _Refused(f"it asks for {path[:120]!r}, which no such file needs: it was not loaded")
        return type(name, (Recorded,), {"path": path})

    def persistent_load(self, pid: Any) -> Any:
        return Recorded(pid)  # a storage, whose bytes are an entry of their own
