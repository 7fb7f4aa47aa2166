"""GovReport in the forms that others keep it in: parquet, as the hub has it, and the pickles of NVIDIA's scripts.

Both are read into (input_ids_NS, loss_mask_NS) chunks for packed.write_chunks; every row is checked on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama2_lora import files, pickles
from llama2_lora.data import packed
from llama2_lora.findings import one_line

CHUNK_ROWS = 32  # 2 MiB of int32 ids and labels at 8,192 tokens
READ_AHEAD_BYTES = 1 << 20  # without it pyarrow reads a row group, 1,000 rows here, in one go
Chunk = tuple[np.ndarray, np.ndarray]

# All that a pickle of arrays and numbers asks for. None of it is called: see _plain.
ARRAY_NAMES = re.compile(
    r"numpy\.(ndarray|dtype)|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|_codecs\.encode"
)
NUMBERS = re.compile(r"[iu][1248]|b1|bool")  # of numpy's dtypes: those of ids and masks


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
    """Chunks of the files one behind the other. ValueError where they are not what `split` says.

    With pyarrow: `datasets` 5.0.1, streaming in Arrow's format, takes 3 times the CPU (3.6 s against 1.2 s for GovReport)
    and 4.7 times the memory (850 MiB against 180), its import included (benchmarks/packed_rows.py).
    """
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        if rows != split.rows:
            raise ValueError(f"{rows} rows, {split.rows} were expected")
        yield from split.checked(chain.from_iterable(_read_file(path, split.sequence_length) for path in paths))
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {one_line(str(error), limit=500)}") from None


def read_pickle(path: Path, split: Split) -> Iterator[Chunk]:
    """Chunks of a file that holds a pickled list of {input_ids, loss_mask, ...}, as NVIDIA's script writes it."""
    samples = _unpickle(path)
    if len(samples) != split.rows:
        raise ValueError(f"{path}: {len(samples)} rows, {split.rows} were expected")
    try:
        yield from split.checked(
            _rows(islice(samples, first, first + CHUNK_ROWS)) for first in range(0, len(samples), CHUNK_ROWS)
        )
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not a pickle of NVIDIA's script: {one_line(str(error), limit=500)}") from None


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
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (lists and pa.types.is_integer(kind.value_type)):
        raise ValueError(f"a column holds {kind}: must hold lists of integers")
    lengths = column.value_lengths()
    values = column.flatten()
    if column.null_count or values.null_count or (lengths.to_numpy(zero_copy_only=False) != sequence_length).any():
        raise ValueError(f"every row must have {sequence_length} tokens")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), sequence_length)


def _rows(samples: Iterable[Any]) -> Chunk:
    pairs = [(_integers(sample["input_ids"]), _integers(sample["loss_mask"])) for sample in samples]
    return np.stack([ids_S for ids_S, _ in pairs]), np.stack([mask_S for _, mask_S in pairs])


def _integers(value: Any) -> np.ndarray:
    """A row of ids or of a mask: a list, a tuple or an array. ValueError where something else than whole numbers is in it."""
    found = _plain(value)
    if isinstance(found, (list, tuple)):
        found = np.asarray([_plain(item) for item in found])
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iub":
        raise ValueError("a row holds something else than whole numbers")
    return found


def _plain(value: Any) -> Any:
    """A value as it is; an array or number of numpy's that a pickle describes (pickles.Recorded), made here.

    numpy's own functions, given a state that does not fit, have crashed the interpreter.
    """
    if not isinstance(value, pickles.Recorded):
        return value
    kind = value.path.rsplit(".", 1)[1]
    if kind == "_reconstruct":  # of numpy.ndarray; what it is comes as a state
        _, shape, dtype, fortran_order, data = value.state
        return _array(shape, dtype, data, fortran_order)
    if kind == "_frombuffer":  # protocol 5
        data, dtype, shape, order = value.arguments
        return _array(shape, dtype, data, order == "F")
    if kind == "scalar":
        dtype, data = value.arguments
        return _array((1,), dtype, data, False)[0]
    raise ValueError(f"it holds a {kind} where numbers must be")


def _array(shape: Any, dtype: Any, data: Any, fortran_order: Any) -> np.ndarray:
    """ValueError where the parts of an array do not fit each other."""
    if len(shape) != 1 or not isinstance(shape[0], int) or fortran_order not in (0, 1):
        raise ValueError(f"it holds an array of the shape {shape!s:.60}: rows must have one axis")
    if not isinstance(dtype, pickles.Recorded) or dtype.path != "numpy.dtype":
        raise ValueError("it holds an array without a dtype")
    code = str(dtype.arguments[0])
    if code == "O8" and isinstance(data, list) and len(data) == shape[0]:  # the list of all rows
        array = np.empty(len(data), dtype=object)
        array[:] = data
        return array
    order: Any = dtype.state[1] if dtype.state else "="
    if not NUMBERS.fullmatch(code) or order not in ("<", ">", "|", "="):
        raise ValueError(f"it holds numbers of the kind {code:.20}: must be whole")
    data = _bytes(data)
    number = np.dtype(code).newbyteorder(order)
    if len(data) != shape[0] * number.itemsize:
        raise ValueError(f"it holds {len(data)} bytes for {shape[0]} numbers")
    return np.frombuffer(data, number)


def _bytes(data: Any) -> bytes:
    if isinstance(data, pickles.Recorded) and data.path == "_codecs.encode":  # how protocol 2 writes bytes
        data = str(data.arguments[0]).encode("latin1")
    return bytes(memoryview(data))


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            holds_objects = read(file)[2].hasobject
        except Exception:  # a Python literal that is evaluated: damaged ones raise a dozen types
            raise ValueError(f"{path} is not a .npy file") from None
        try:
            if not holds_objects:
                raise ValueError("it holds plain numbers")
            samples = _plain(pickles.load(file, ARRAY_NAMES))
            len(samples)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a pickle of NVIDIA's script: {one_line(str(error), limit=500)}") from None
    return samples
