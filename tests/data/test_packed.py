"""govreport: packing, the two mask alignments, files and manifest, and every refusal by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llama2_lora import files
from llama2_lora.data import packed

S = 4
END = 2


def write(path: Path, ids: list[list[int]], mask: list[list[int]]) -> Path:
    packed.write_split(path, np.array(ids), np.array(mask))
    return path


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return write(tmp_path / "train.npy", [[5, 6, 7, 8], [9, 10, 11, 31_999]], [[0, 1, 1, 0], [1, 1, 1, 1]])


def test_each_alignment_scores_the_targets_it_names() -> None:
    # Labels are kept at positions 2 and 3, so the reference scores targets 2 and 3, which positions 1 and 2 predict.
    mask_S = np.array([0, 0, 1, 1, 0], dtype=np.uint8)
    assert packed.aligned_mask(mask_S, "nvidia").tolist() == [0, 0, 1, 1, 0]
    assert packed.aligned_mask(mask_S, "reference").tolist() == [0, 1, 1, 0, 0]


def test_the_last_position_has_no_target() -> None:
    ones_BS = np.ones((2, 3), dtype=np.uint8)
    for how in ("nvidia", "reference"):
        weights_BS = packed.aligned_mask(ones_BS, how)
        assert weights_BS.dtype == np.float32
        assert weights_BS.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_an_unknown_alignment_is_refused() -> None:
    with pytest.raises(ValueError, match="LOSS_MASK_ALIGN=shifted: must be nvidia or reference"):
        packed.aligned_mask(np.ones(3, dtype=np.uint8), "shifted")


DOCUMENTS = [([10, 11, 12], [20, 21]), ([13], [22, 23, 24]), ([14], [25])]
# 10 11 12 20 | 21 </s> 13 22 | 23 24 </s> 14 | 25 </s>


def test_packing_for_training_scores_everything_and_drops_the_rest() -> None:
    ids_NS, mask_NS = packed.pack(DOCUMENTS, S, END, score="all")
    assert ids_NS.tolist() == [[10, 11, 12, 20], [21, END, 13, 22], [23, 24, END, 14]]
    assert mask_NS.tolist() == [[1] * 4] * 3


def test_packing_for_validation_scores_summaries_without_end_tokens() -> None:
    documents = [([10, 11], [20, 21]), ([13], [22, 23, 24])]  # 10 11 20 21 | </s> 13 22 23 | 24 </s>
    ids_NS, mask_NS = packed.pack(documents, S, END, score="summary")
    assert ids_NS.tolist() == [[10, 11, 20, 21], [END, 13, 22, 23]]
    assert mask_NS.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_packing_drops_rows_that_either_alignment_would_leave_empty() -> None:
    documents = [([10, 11, 12], [20]), ([13, 14, 15, 16], [21, 22])]  # 10 11 12 20* | </s> 13 14 15 | 16 21* 22* </s>
    ids_NS, mask_NS = packed.pack(documents, S, END, score="summary")
    assert ids_NS.tolist() == [[16, 21, 22, END]]
    assert mask_NS.tolist() == [[0, 1, 1, 0]]


def test_packing_refuses_too_little_text_and_unknown_scores() -> None:
    with pytest.raises(ValueError, match="3 tokens: at least one row of 4"):
        packed.pack([([1], [3])], S, END, score="all")
    with pytest.raises(ValueError, match="score=prompt"):
        packed.pack(DOCUMENTS, S, END, score="prompt")


def test_a_split_reads_back_and_needs_no_pickle(split: Path) -> None:
    records = packed.open_split(split, S, 32_000, rows=2)
    assert isinstance(records, np.memmap)
    assert records["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 31_999]]
    assert records["loss_mask"].tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
    plain = np.load(split, mmap_mode="r", allow_pickle=False)
    assert plain.dtype == packed.row_dtype(S)
    assert plain.tobytes() == records.tobytes()


def test_the_real_sizes() -> None:
    assert packed.row_dtype(8192).itemsize == 24_576


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(split: Path) -> None:
    before = split.read_bytes()
    with pytest.raises(ValueError, match="1 rows came, 2 were announced"):
        packed.write_chunks(split, 2, S, [(np.ones((1, S)), np.ones((1, S)))])
    assert split.read_bytes() == before
    assert [path.name for path in split.parent.iterdir()] == ["train.npy"]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2, 3, 70_000]], [[1, 1, 1, 1]], "0 to 65535"),
        ([[1, 2, 3, -1]], [[1, 1, 1, 1]], "0 to 65535"),
        ([[1, 2, 3, 4]], [[1, 1, 1]], r"both must be \(1, 4\)"),
    ],
)
def test_writing_refuses_what_does_not_fit(tmp_path: Path, ids: list, mask: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "train.npy", ids, mask)


def test_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"run `python scripts/download_dataset.py --data_dir {tmp_path}`"):
        packed.open_split(tmp_path / "train.npy", S, 32_000)


@pytest.mark.parametrize("cut", [1, 12, 13, 24])
def test_truncated_files_are_refused(split: Path, cut: int) -> None:
    split.write_bytes(split.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="its header promises"):
        packed.open_split(split, S, 32_000)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PAR1 something else"])
def test_other_files_are_refused(split: Path, content: bytes) -> None:
    split.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a \.npy file: make it again"):
        packed.open_split(split, S, 32_000)


def test_another_length_or_count_is_refused(split: Path) -> None:
    with pytest.raises(ValueError, match="rows of 4, 8 tokens were expected"):
        packed.open_split(split, 8, 32_000)
    with pytest.raises(ValueError, match="has 2 rows, 3901 were expected"):
        packed.open_split(split, S, 32_000, rows=3901)


def test_pickles_are_refused_without_being_loaded(split: Path) -> None:
    np.save(split, np.array([{"input_ids": [1, 2]}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="--import-pickle"):
        packed.open_split(split, S, 32_000)


def test_other_arrays_are_refused(split: Path) -> None:
    np.save(split, np.zeros((2, S), dtype=np.int64))
    with pytest.raises(ValueError, match=r"rows of int64 \(2, 4\), 4 tokens were expected"):
        packed.open_split(split, S, 32_000)


def test_ids_outside_the_vocabulary_are_refused(split: Path) -> None:
    with pytest.raises(ValueError, match="token id 31999: must be below the vocabulary of 768"):
        packed.open_split(split, S, 768)


@pytest.mark.parametrize("mask", [[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
def test_rows_without_a_target_are_refused_by_number(tmp_path: Path, mask: list[int]) -> None:
    path = write(tmp_path / "validation.npy", [[1, 2, 3, 4]] * 300, [[1, 1, 1, 1]] * 299 + [mask])
    with pytest.raises(ValueError, match="row 299 scores no token"):
        packed.open_split(path, S, 32_000)


def test_masks_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.npy", [[1, 2, 3, 4]], [[1, 2, 1, 1]])
    with pytest.raises(ValueError, match="loss_mask has the value 2"):
        packed.open_split(path, S, 32_000)


def test_the_manifest_says_what_the_files_are(split: Path) -> None:
    directory = split.parent
    assert packed.read_manifest(directory) is None
    packed.write_manifest(directory, S, 32_000, source="owner/name", revision="abc")
    manifest = packed.read_manifest(directory)
    assert manifest is not None
    assert (manifest["sequence_length"], manifest["vocab_size"]) == (S, 32_000)
    assert (manifest["source"], manifest["revision"]) == ("owner/name", "abc")
    (name, entry), *others = manifest["files"].items()
    assert (name, others) == ("train.npy", [])
    assert (entry["rows"], entry["bytes"]) == (2, split.stat().st_size)
    assert entry["sha256"] == files.file_sha256(split)


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert files.file_sha256(path).startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180-4's example


def test_reading_the_manifest_opens_no_split(split: Path) -> None:
    packed.write_manifest(split.parent, S, 32_000, source="s", revision="r")
    split.unlink()
    manifest = packed.read_manifest(split.parent)
    assert manifest is not None
    assert manifest["files"]["train.npy"]["rows"] == 2


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"files": {"train.npy": {}}})])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / packed.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: remove it"):
        packed.read_manifest(tmp_path)
