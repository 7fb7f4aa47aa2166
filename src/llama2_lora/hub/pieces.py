"""Large files that a repository holds in pieces, `NAME.part-00`, `NAME.part-01` and so on: which they are, and joining them.

Pieces are appended to the first one and removed one by one, so that joining needs room for one piece, not for a second
copy. What is joined already follows from the length of `NAME.joining`, so a killed join goes on where it stopped.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from llama2_lora.hub.client import Copy, RemoteFile

# split(1)'s suffixes, digits or letters, behind "part". Digits alone would take zarr's chunks (0.0.0) for pieces.
PIECE = re.compile(r"(?P<whole>.+)[._-]part[._-]?(?P<order>\d+|[a-z]{2,})")


class SplitFile(NamedTuple):
    path: str  # of the whole file
    pieces: list[RemoteFile]  # in order

    @property
    def bytes(self) -> int:
        return self._ends()[-1]

    def copies(self, folder: Path) -> list[Copy]:
        """Where in `folder` each piece is to be found: in the (partly) joined file, else on its own."""
        whole, joining = folder / self.path, self._joining(folder)
        joined = whole if whole.exists() else joining
        joined_bytes = joined.stat().st_size if joined.exists() else 0
        if joined_bytes > self.bytes:
            return [Copy(piece, joined) for piece in self.pieces]  # of none of them the right size
        return [
            Copy(piece, joined, end - piece.bytes) if end <= joined_bytes else Copy(piece, folder / piece.path)
            for piece, end in zip(self.pieces, self._ends(), strict=True)
        ]

    def missing(self, folder: Path) -> list[RemoteFile]:
        """Pieces that are not yet part of the joined file."""
        return [copy.file for copy in self.copies(folder) if copy.path == folder / copy.file.path]

    def join(self, folder: Path) -> None:
        """Make the whole file of its pieces, which are removed."""
        whole, joining = folder / self.path, self._joining(folder)
        if whole.exists():
            return
        if not joining.exists():
            (folder / self.pieces[0].path).rename(joining)
        for piece, end in zip(self.pieces, self._ends(), strict=True):
            path = folder / piece.path
            if joining.stat().st_size < end:
                _append(path, joining, end - piece.bytes)
            path.unlink(missing_ok=True)
        joining.rename(whole)

    def _joining(self, folder: Path) -> Path:
        return folder / f"{self.path}.joining"

    def _ends(self) -> list[int]:
        return list(accumulate(piece.bytes for piece in self.pieces))


def find(files: Sequence[RemoteFile]) -> tuple[list[RemoteFile], list[SplitFile]]:
    """Files that stand for themselves, and those that are split."""
    plain: list[RemoteFile] = []
    pieces: dict[str, list[tuple[int, str, RemoteFile]]] = {}
    for file in files:
        if match := PIECE.fullmatch(file.path):
            order = match["order"]
            pieces.setdefault(match["whole"], []).append((len(order), order, file))  # aa ... zz, then aaa
        else:
            plain.append(file)
    return plain, [SplitFile(whole, [file for *_, file in sorted(found)]) for whole, found in pieces.items()]


def _append(piece: Path, joining: Path, offset: int) -> None:
    with piece.open("rb") as source, joining.open("r+b") as target:
        target.truncate(offset)  # a killed call may have left part of this piece
        target.seek(offset)
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())  # before the piece goes
