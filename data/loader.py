"""From a data set to the loader of its micro-batches: packed or not, with bad samples skipped or not."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from data.batching import NamingCollator, TrainCollator, UpdateBatchSampler, column_values
from data.dataset import ConversationDataset
from data.packing import PackedCollator, PackedDataset, pack
from data.skipping import CheckedCollator, CheckedUpdates
from data.worst_case import Row
from memory_run import longest_row


def build_loader(
    config: Any, dataset: ConversationDataset, processor: ProcessorMixin, num_processes: int
) -> tuple[DataLoader, UpdateBatchSampler, Row]:
    """The loader for accelerate to prepare, its sampler, and the largest row that can come.

    Args:
        config: train.py's.
        dataset: its records have `num_tokens` and `num_label_tokens`.
    """
    num_tokens = np.minimum(column_values(dataset.records, "num_tokens"), config.max_seq_len)
    num_label_tokens = column_values(dataset.records, "num_label_tokens")
    records = dataset.records
    collator_class = TrainCollator
    if config.packing:  # from here on a row of samples stands where a sample stood
        packing = pack(num_tokens, config.max_seq_len, config.seed, num_processes)
        dataset, collator_class = PackedDataset(dataset, packing), PackedCollator
        num_tokens, num_label_tokens = packing.sums(num_tokens), packing.sums(num_label_tokens)
    sampler = UpdateBatchSampler(
        num_label_tokens,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        num_processes,
        config.seed,
        num_tokens,
        config.group_by_length,
    )
    collator = NamingCollator(collator_class(processor, config.max_seq_len))
    if config.on_bad_sample == "skip":
        dataset, collator = CheckedUpdates(dataset), CheckedCollator(collator)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=config.dataloader_num_workers,
        persistent_workers=config.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making its iterator must not change the numbers that dropout draws
    )
    return loader, sampler, longest_row(records, num_tokens, processor.num_image_tokens)
