"""A folder that a script makes from a recipe: there when it is whole, and made again only when the recipe has changed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = "recipe.txt"  # in the folder: what it was made from


def is_up_to_date(folder: Path, recipe: str) -> bool:
    """Whether this recipe made the folder. ValueError where something else did, for `replaced` would delete it."""
    try:
        return (folder / RECIPE).read_text() == recipe
    except FileNotFoundError:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something else: choose a new folder, or remove it") from None
        return False


@contextmanager
def replaced(folder: Path, recipe: str) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends without an error."""
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / RECIPE).write_text(recipe)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(path: Path) -> Path:
    """Where a file is written before it takes its name: always the same, so a killed run leaves at most one behind."""
    return path.with_name(f"{path.name}.partial")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
