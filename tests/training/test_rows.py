"""Rows, weights and their order: what every rank takes, whatever the layout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2_lora.data import packed
from llama2_lora.data.inspection import expected
from llama2_lora.training.data import PADDING, PackedRows, Splits, evaluation_order, micro_batches, training_order


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], dtype=np.uint16)
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1]], dtype=np.uint8)
    packed.write_split(tmp_path / "train.npy", ids, mask)
    packed.write_split(tmp_path / "validation.npy", ids + 1, mask)
    packed.write_manifest(tmp_path, 4, 16, "tests", "none")
    return tmp_path


def rows(folder: Path, mask_alignment: str = "nvidia", split: str = "train") -> PackedRows:
    return PackedRows(Splits(folder, expected(folder, 4, 16, gpu=False), 4, 16), split, mask_alignment)


def test_a_row_has_the_next_token_as_label_and_weights_that_sum_to_1(folder: Path) -> None:
    row = rows(folder)[0]
    assert row["tokens"].tolist() == [5, 6, 7, 8]
    assert row["labels"].tolist()[:3] == [6, 7, 8]  # the last position has no target
    assert row["loss_weights"].tolist() == [0.0, 0.5, 0.5, 0.0]
    assert rows(folder, "reference")[0]["loss_weights"].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert rows(folder)[1]["loss_weights"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])
    assert rows(folder, split="validation")[1]["tokens"].tolist() == [10, 11, 12, 13]


def test_a_padding_row_weighs_nothing(folder: Path) -> None:
    row = rows(folder)[PADDING]
    assert row["loss_weights"].sum() == 0
    assert row["tokens"].shape == (4,)
    assert row["tokens"].dtype == torch.int64


def test_both_files_are_opened_at_the_first_row_only(folder: Path) -> None:
    train = rows(folder)
    (folder / "validation.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"validation\.npy"):
        train[0]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("how", ["cut", "replaced", "written"])
def test_a_file_that_changes_under_a_run_ends_it_with_its_name(folder: Path, how: str, split: str) -> None:
    """Mapped, a file that is cut ends the process with SIGBUS. The validation split is held from the start."""
    opened = rows(folder, split=split)
    assert opened[0]["tokens"].tolist()
    path = folder / f"{split}.npy"
    if how == "cut":
        os.truncate(path, path.stat().st_size - 12)
    elif how == "replaced":
        packed.write_split(path, np.full((2, 4), 3), np.ones((2, 4)))
    else:
        with path.open("r+b") as file:
            file.seek(-12, os.SEEK_END)
            file.write(bytes(12))
    with pytest.raises(ValueError, match=rf"{split}\.npy was changed, cut or replaced since it was opened"):
        opened[1]


def test_a_held_split_must_have_the_manifests_hash(folder: Path) -> None:
    train = rows(folder)
    packed.write_split(folder / "validation.npy", np.full((2, 4), 3), np.array([[1, 1, 0, 1]] * 2))
    with pytest.raises(ValueError, match=r"validation\.npy has sha256 .*, the manifest says"):
        train[0]


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    order = training_order(seed=1, rows=10, samples=25)
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert training_order(1, 10, 25).tolist() == order.tolist()
    assert training_order(2, 10, 25).tolist() != order.tolist()
    assert training_order(1, 10, 5).tolist() == order[:5].tolist()  # does not depend on MAX_STEPS


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (2, 1), (8, 1), (2, 16), (3, 4), (64, 1), (128, 2)])
def test_an_evaluation_takes_all_173_rows_once(dp: int, micro: int) -> None:
    order = evaluation_order(173, dp, micro)
    per_rank = [micro_batches(order, rank, dp, micro) for rank in range(dp)]
    assert len({len(batches) for batches in per_rank}) == 1  # no rank waits for another in a collective
    assert all(len(batch) == micro for batches in per_rank for batch in batches)
    seen = [row for batches in per_rank for batch in batches for row in batch]
    assert sorted(row for row in seen if row != PADDING) == list(range(173))


@pytest.mark.parametrize(("dp", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_global_batch_holds_the_same_rows_under_every_layout(dp: int, micro: int) -> None:
    order = np.arange(32)
    accumulation = 8 // (dp * micro)
    for step in range(4):
        rows = []
        for rank in range(dp):
            batches = micro_batches(order, rank, dp, micro)[step * accumulation : (step + 1) * accumulation]
            rows += [row for batch in batches for row in batch]
        assert sorted(rows) == list(range(8 * step, 8 * step + 8))
