"""Rows, weights and their order: what every rank takes, whatever the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llama2_lora.data import packed
from llama2_lora.training.data import PADDING, PackedRows, evaluation_order, micro_batches, training_order


@pytest.fixture
def split(tmp_path: Path) -> Path:
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], dtype=np.uint16)
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1]], dtype=np.uint8)
    packed.write_split(tmp_path / "train.npy", ids, mask)
    return tmp_path / "train.npy"


def test_a_row_has_the_next_token_as_label_and_weights_that_sum_to_1(split: Path) -> None:
    row = PackedRows(split, 4, 16, 2, "nvidia")[0]
    assert row["tokens"].tolist() == [5, 6, 7, 8]
    assert row["labels"].tolist()[:3] == [6, 7, 8]  # the last position has no target
    assert row["loss_weights"].tolist() == [0.0, 0.5, 0.5, 0.0]
    assert PackedRows(split, 4, 16, 2, "reference")[0]["loss_weights"].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert PackedRows(split, 4, 16, 2, "nvidia")[1]["loss_weights"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_a_padding_row_weighs_nothing(split: Path) -> None:
    row = PackedRows(split, 4, 16, 2, "nvidia")[PADDING]
    assert row["loss_weights"].sum() == 0
    assert row["tokens"].shape == (4,)
    assert row["tokens"].dtype == torch.int64


def test_files_are_opened_at_the_first_row_only(split: Path) -> None:
    rows = PackedRows(split.with_name("absent.npy"), 4, 16, 2, "nvidia")
    with pytest.raises(FileNotFoundError):
        rows[0]


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
