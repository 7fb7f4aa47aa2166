"""Data module: rows of the packed data set -> micro batches of every data-parallel rank.

Every rank computes the same order from the seed and takes its own rows, so the global batch of a step does not depend on
the layout. Both files are opened at the first row, which is after run_start (rules §11); before, only metadata is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state
from nemo.lightning.data import WrappedDataLoader, setup_microbatch_calculator
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from torch.utils.data import Dataset

from llama2_lora.config.settings import Settings
from llama2_lora.data import inspection, packed
from llama2_lora.data.inspection import Expected
from llama2_lora.data.rows import OpenSplit

PADDING = -1  # a row index that stands for an empty row


class Splits:
    """Both files of a run, opened together at the first row, and kept open: what takes their names later is not read."""

    def __init__(self, folder: Path, expected: dict[str, Expected], sequence_length: int, vocab_size: int) -> None:
        self.folder, self.expected = folder, expected
        self.sequence_length, self.vocab_size = sequence_length, vocab_size

    def row(self, split: str, index: int) -> np.ndarray:
        """A record of "train" or "validation"."""
        return self._open[f"{split}.npy"][index]

    @cached_property
    def _open(self) -> dict[str, OpenSplit]:
        return inspection.open_splits(self.folder, self.expected, self.sequence_length, self.vocab_size)


class PackedRows(Dataset):
    """Row i -> tokens_S, labels_S (int64) and loss_weights_S (fp32), which sum to 1 over a row, to 0 over padding."""

    def __init__(self, splits: Splits, split: str, mask_alignment: str) -> None:
        self.splits, self.split, self.mask_alignment = splits, split, mask_alignment

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == PADDING:
            tokens_S = np.zeros(self.splits.sequence_length, dtype=np.int64)
            weights_S = np.zeros(self.splits.sequence_length, dtype=np.float32)
        else:
            record = self.splits.row(self.split, index)
            tokens_S = record["input_ids"].astype(np.int64)
            mask_S = packed.aligned_mask(record["loss_mask"], self.mask_alignment)
            weights_S = (mask_S / mask_S.sum()).astype(np.float32)
        labels_S = np.roll(tokens_S, -1)  # the last position has no target; its weight is 0
        return {
            "tokens": torch.from_numpy(tokens_S),
            "labels": torch.from_numpy(labels_S),
            "loss_weights": torch.from_numpy(weights_S),
        }


def training_order(seed: int, rows: int, samples: int) -> np.ndarray:
    """Row indices of the first `samples` sequences: one permutation of all rows after another."""
    epochs = -(-samples // rows)
    return np.concatenate([np.random.default_rng((seed, epoch)).permutation(rows) for epoch in range(epochs)])[:samples]


def evaluation_order(rows: int, dp: int, micro_batch_size: int) -> np.ndarray:
    """All rows once, padded with empty ones so that every data-parallel rank takes the same number of full batches."""
    padding = -rows % (dp * micro_batch_size)
    return np.concatenate([np.arange(rows), np.full(padding, PADDING)])


def micro_batches(order: np.ndarray, dp_rank: int, dp: int, micro_batch_size: int) -> list[list[int]]:
    """This rank's micro batches of a global order: consecutive blocks go to consecutive ranks."""
    return order.reshape(-1, dp, micro_batch_size)[:, dp_rank].tolist()


class Sampler(DataSampler):
    """Tells Megatron how many micro batches a step has: an evaluation is one step over all of its batches."""

    dataloader_type = "single"

    def __init__(self, settings: Settings, validation_micro_batches: int) -> None:
        self.settings = settings
        self.validation_micro_batches = validation_micro_batches

    def setup(self, global_rank: int) -> None:
        setup_microbatch_calculator(global_rank, self.settings.batch.micro, self.settings.global_batch_size)

    def transform_dataloader(self, dataloader: WrappedDataLoader, consumed_samples: int = 0) -> WrappedDataLoader:
        return dataloader  # GovReport's loaders are already this rank's

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        batch = self.settings.batch
        step.seq_length = step.decoder_seq_length = batch.sequence_length
        step.micro_batch_size = batch.validation_micro if step.forward_only else batch.micro
        step.num_microbatches = self.validation_micro_batches if step.forward_only else batch.gradient_accumulation_steps
        return step


class GovReport(pl.LightningDataModule):
    """Train and validation split of one run."""

    def __init__(self, settings: Settings, seed: int, vocab_size: int) -> None:
        super().__init__()
        self.settings, self.seed = settings, seed
        self.vocab_size = vocab_size
        folder, sequence_length = Path(settings.run.data_path), settings.batch.sequence_length
        expected = inspection.expected(folder, sequence_length, vocab_size, settings.system.platform == "gpu")
        self.splits = Splits(folder, expected, sequence_length, vocab_size)
        self.train_rows, self.validation_rows = expected["train.npy"].rows, expected["validation.npy"].rows
        dp, micro = settings.validation_data_parallel_size, settings.batch.validation_micro
        self.data_sampler = Sampler(settings, -(-self.validation_rows // (dp * micro)))

    def train_dataloader(self) -> WrappedDataLoader:
        s = self.settings
        order = training_order(self.seed, self.train_rows, s.optimization.max_steps * s.global_batch_size)
        return self._loader("train", order, s.batch.micro, own_rows=False)

    def val_dataloader(self) -> WrappedDataLoader:
        micro = self.settings.batch.validation_micro
        order = evaluation_order(self.validation_rows, self.settings.validation_data_parallel_size, micro)
        return self._loader("validation", order, micro, own_rows=self.settings.parallel.evaluation_cp == 1)

    def _loader(self, split: str, order: np.ndarray, micro_batch_size: int, own_rows: bool) -> WrappedDataLoader:
        """own_rows: context-parallel ranks take different rows, not parts of the same ones."""
        dataset = PackedRows(self.splits, split, self.settings.batch.mask_alignment)
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=own_rows)
        dp = parallel_state.get_data_parallel_world_size(with_context_parallel=own_rows)
        batches = micro_batches(order, rank, dp, micro_batch_size)
        # No workers: a row is one read of 24 KiB, and a worker would read ahead of run_start.
        return WrappedDataLoader(mode=split, dataset=dataset, batch_sampler=batches, num_workers=0)


def synthetic_batches(settings: Settings, vocab_size: int, micro_batch_size: int) -> Iterator[tuple[dict, int, int]]:
    """Endless random rows in the loaders' form, for warm-up: no data set is touched."""
    generator = torch.Generator().manual_seed(0)
    shape = (micro_batch_size, settings.batch.sequence_length)
    while True:
        tokens_BS = torch.randint(0, vocab_size, shape, generator=generator)
        weights_BS = torch.full(shape, 1.0 / shape[1])
        yield {"tokens": tokens_BS, "labels": tokens_BS.roll(-1, dims=1), "loss_weights": weights_BS}, 0, 0
