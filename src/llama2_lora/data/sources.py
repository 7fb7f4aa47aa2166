"""GovReport in the forms that others keep it in: parquet, as the hub has it, and the pickles of NVIDIA's scripts.

Both are read into (input_ids_NS, loss_mask_NS) chunks for packed.write_chunks; every row is checked on the way.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama2_lora import files
from llama2_lora.data import packed

CHUNK_ROWS = 32  # 2 MiB of int32 ids and labels at 8,192 tokens
READ_AHEAD_BYTES = 1 << 20  # without it pyarrow reads a row group, 1,000 rows here, in one go
Chunk = tuple[np.ndarray, np.ndarray]

# All that a pickle of arrays and numbers asks for. None of it runs code of the file's choosing.
PICKLED_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.int64().__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
}


class Split(NamedTuple):
    """What must be true of train.npy or validation.npy."""

    rows: int
    sequence_length: int
    vocab_size: int
    all_scored: bool  # train: labels equal ids, so every token counts

    def checked(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same chunks. ValueError names the first row that breaks a rule."""
        first = 0
        for ids_NS, mask_NS in chunks:
            if {ids_NS.shape[1:], mask_NS.shape[1:]} != {(self.sequence_length,)}:
                raise ValueError(f"every row must have {self.sequence_length} tokens")
            packed.check_rows(ids_NS, mask_NS, self.vocab_size, first)
            if self.all_scored and not mask_NS.all():
                row = first + int((~mask_NS.all(axis=1)).argmax())
                raise ValueError(f"row {row}: labels differ from input_ids, in the train split every token is scored")
            first += len(ids_NS)
            yield ids_NS, mask_NS


def read_parquet(paths: Sequence[Path], split: Split) -> Iterator[Chunk]:
    """Chunks of the files one behind the other. ValueError where they are not what `split` says."""
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        if rows != split.rows:
            raise ValueError(f"{rows} rows, {split.rows} were expected")
        yield from split.checked(chain.from_iterable(_read_file(path, split.sequence_length) for path in paths))
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from None


def read_pickle(path: Path, split: Split) -> Iterator[Chunk]:
    """Chunks of a file that holds a pickled list of {input_ids, loss_mask, ...}, as NVIDIA's script writes it."""
    samples = _unpickle(path)
    if len(samples) != split.rows:
        raise ValueError(f"{path}: {len(samples)} rows, {split.rows} were expected")
    try:
        yield from split.checked(
            _rows(islice(samples, first, first + CHUNK_ROWS)) for first in range(0, len(samples), CHUNK_ROWS)
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a pickle of NVIDIA's script: {error}") from None


def write_pickle(path: Path, records_N: np.ndarray) -> None:
    """The file that NVIDIA's script makes of the same rows: ids as int32 arrays, masks and sequence starts as lists."""
    samples = [
        {"input_ids": record["input_ids"].astype(np.int32), "loss_mask": record["loss_mask"].tolist(), "seq_start_id": [0]}
        for record in records_N
    ]
    with files.new_file(path) as file:
        np.save(file, np.array(samples, dtype=object), allow_pickle=True)


def _read_file(path: Path, sequence_length: int) -> Iterator[Chunk]:
    with pq.ParquetFile(path, buffer_size=READ_AHEAD_BYTES) as file:
        for batch in file.iter_batches(CHUNK_ROWS, columns=["input_ids", "labels"]):
            ids_NS = _matrix(batch.column("input_ids"), sequence_length)
            labels_NS = _matrix(batch.column("labels"), sequence_length)
            mask_NS = labels_NS != packed.IGNORED_LABEL
            if (mask_NS & (labels_NS != ids_NS)).any():
                raise ValueError(f"labels must be {packed.IGNORED_LABEL} or equal input_ids")
            yield ids_NS, mask_NS.view(np.uint8)


def _matrix(column: pa.Array, sequence_length: int) -> np.ndarray:
    """The numbers of a column of lists, without a copy."""
    lengths = column.value_lengths()
    values = column.flatten()
    if column.null_count or values.null_count or (lengths.to_numpy(zero_copy_only=False) != sequence_length).any():
        raise ValueError(f"every row must have {sequence_length} tokens")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), sequence_length)


def _rows(samples: Iterable[Any]) -> Chunk:
    pairs = [(np.asarray(sample["input_ids"]), np.asarray(sample["loss_mask"])) for sample in samples]
    return np.stack([ids_S for ids_S, _ in pairs]), np.stack([mask_S for _, mask_S in pairs])


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return PICKLED_NAMES[module.replace("numpy._core.", "numpy.core."), name]
        except KeyError:
            raise ValueError(f"it asks for {module}.{name}, which no data set needs: it was not loaded") from None


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            if not read(file)[2].hasobject:
                raise ValueError("it holds plain numbers")
            return _DataUnpickler(file).load()
        except (ValueError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{path} is not a pickle of NVIDIA's script: {error}") from None
