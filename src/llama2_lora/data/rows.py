"""Rows of a split as training reads them: from a descriptor that stays open, each row looked at when it comes.

Not mapped: where a file is cut under a mapping, the kernel ends the process (SIGBUS) without a word. Here a row that is gone,
or a file that has changed since it was opened, is an error that names the file.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama2_lora.data import packed

BLOCK_BYTES = 1 << 20


class OpenSplit:
    """A split that is open: `split[i]` is row i, a record with the fields input_ids [S] and loss_mask [S].

    Opening reads the header, not the rows, but of a split that is to be `held` (validation: 4 MB), which stays in memory.
    """

    def __init__(
        self, path: Path, sequence_length: int, vocab_size: int, rows: int, held: bool = False, sha256: str | None = None
    ) -> None:
        """ValueError where the header is not that of `rows` rows, or a held split has another sha256; OSError as open gives."""
        self.path, self.vocab_size = Path(path), vocab_size
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.rows, self.row_offset = _checked_header(self.descriptor, self.path, sequence_length)
        if self.rows != rows:
            raise ValueError(f"{self.path} has {self.rows} rows, {rows} were expected: {packed.again(self.path)}")
        self.dtype = packed.row_dtype(sequence_length)
        self._state = self._file_state()
        self._held = self._read_all(sha256) if held else None

    def __del__(self) -> None:
        if (descriptor := getattr(self, "descriptor", None)) is not None:
            os.close(descriptor)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> np.ndarray:
        record = self._records(row, 1)
        self._check(record, row)
        return record[0]

    def chunks(self, rows: int = packed.SCAN_ROWS) -> Iterator[np.ndarray]:
        """All rows, each looked at, `rows` at a time."""
        for first in range(0, self.rows, rows):
            records = self._records(first, min(rows, self.rows - first))
            self._check(records, first)
            yield records

    def sha256(self) -> str:
        """Of the whole file; reads it."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def refuse_other_hash(self, found: str, expected: str) -> None:
        """ValueError where two sha256 differ."""
        if found != expected:
            raise ValueError(f"{self.path} has sha256 {found[:12]}..., the manifest says {expected[:12]}...")

    def _records(self, first: int, count: int) -> np.ndarray:
        offset, length = self.row_offset + first * self.dtype.itemsize, count * self.dtype.itemsize
        if self._held is None:
            data = self._read(offset, length)
        else:
            self._refuse_change()
            data = self._held[offset : offset + length]
        return np.frombuffer(data, self.dtype)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.descriptor, length, offset)
        except OSError as error:  # such as a stale handle: the file server lost it
            raise OSError(f"{self.path} can no longer be read: {error.strerror}") from None
        self._refuse_change(cut=len(data) != length)
        return data

    def _refuse_change(self, cut: bool = False) -> None:
        if cut or self._file_state() != self._state:
            raise ValueError(f"{self.path} was changed, cut or replaced since it was opened: a run keeps its data to the end")

    def _blocks(self) -> Iterator[bytes]:
        """The whole file."""
        size = self._state[0]
        for offset in range(0, size, BLOCK_BYTES):
            yield self._read(offset, min(BLOCK_BYTES, size - offset))

    def _read_all(self, sha256: str | None) -> bytes:
        data = b"".join(self._blocks())
        if sha256 is not None:
            self.refuse_other_hash(hashlib.sha256(data).hexdigest(), sha256)
        return data

    def _check(self, records: np.ndarray, first: int) -> None:
        try:
            packed.check_rows(records["input_ids"], records["loss_mask"], self.vocab_size, first)
        except ValueError as problem:
            raise ValueError(f"{self.path}: {problem}") from None

    def _file_state(self) -> tuple[int, int, bool]:
        """Size, time of the last change, and whether the file still has a name: one that was replaced has none."""
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns, status.st_nlink > 0


def _checked_header(descriptor: int, path: Path, sequence_length: int) -> tuple[int, int]:
    """Number of rows, and where the first one lies."""
    start = os.pread(descriptor, packed.LONGEST_HEADER, 0)
    rows, offset = packed.parse_header(io.BytesIO(start), path, sequence_length)
    packed.check_size(path, os.fstat(descriptor).st_size, rows, offset, sequence_length)
    return rows, offset
