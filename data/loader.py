"""From a data set to the loader of its micro-batches: packed or not, with bad samples skipped or not."""

from copy import copy

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from data.batching import BatchCollator, TrainCollator, UpdateBatchSampler
from data.dataset import ConversationDataset
from data.dummy_image import needs_dummy_images
from data.lengths import column_values
from data.packing import PackedCollator, PackedDataset, pack
from data.sharing import PREFETCH_FACTOR, ignore_lost_reader, workers_that_fit
from data.skipping import CheckedCollator, CheckedUpdates
from data.worst_case import Row, longest_row, worst_case_batch
from step import StepConfig, needs_padding_mask


def build_loader(
    config: StepConfig,
    dataset: ConversationDataset,
    processor: ProcessorMixin,
    num_processes: int,
    group_by_length: bool = False,
) -> tuple[DataLoader, UpdateBatchSampler, Row]:
    """The loader of Batches for accelerate to prepare, its sampler, and the largest row that can come.

    Args:
        dataset: its records have `num_tokens` and `num_label_tokens`. If it skips bad samples, so does the loader.
        group_by_length: samples of similar length share an update.
    """
    records, skips_bad = dataset.records, dataset.skips_bad
    num_tokens = np.minimum(column_values(records, "num_tokens"), config.max_seq_len)
    num_label_tokens = column_values(records, "num_label_tokens")
    collator_class = TrainCollator
    if config.packing:  # from here on an item of the data set is a row of samples
        packing = pack(num_tokens, config.max_seq_len, config.seed)
        dataset, collator_class = PackedDataset(dataset, packing), PackedCollator
        num_tokens, num_label_tokens = packing.sums(num_tokens), packing.sums(num_label_tokens)
    sampler = UpdateBatchSampler(
        num_label_tokens,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        num_processes,
        config.seed,
        num_tokens,
        group_by_length,
    )
    num_images = pc.list_value_length(records.data.column("images")).to_pylist()
    dummy_images = needs_dummy_images(processor, num_images, num_processes)
    collator = collator_class(processor, config.max_seq_len, config.max_image_pixels, dummy_images)
    collator = BatchCollator(collator, keeps_mask=needs_padding_mask(config))
    if skips_bad:
        dataset, collator = CheckedUpdates(dataset), CheckedCollator(collator)
    longest = longest_row(records, num_tokens, processor, config.max_image_pixels)
    batch_bytes = largest_batch_bytes(processor, config, longest)
    num_workers = workers_that_fit(config.dataloader_num_workers, batch_bytes, num_processes)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=ignore_lost_reader,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making its iterator must not change the numbers that dropout draws
    )
    return loader, sampler, longest


def largest_batch_bytes(processor: ProcessorMixin, config: StepConfig, longest: Row) -> int:
    """Bytes of the largest micro-batch that can come: as many times a row's as it has rows."""
    one_row = copy(config)
    one_row.per_device_train_batch_size = 1
    row_bytes = sum(tensor.nbytes for tensor in worst_case_batch(processor, one_row, longest).values())
    return row_bytes * config.per_device_train_batch_size


def sample_with_images(
    config: StepConfig, dataset: ConversationDataset, processor: ProcessorMixin
) -> dict[str, torch.Tensor]:
    """Forward's arguments for one real sample: the first that has images, if any has."""
    index = next((i for i, images in enumerate(dataset.records["images"]) if images), 0)
    return TrainCollator(processor, config.max_seq_len, config.max_image_pixels)([dataset[index]])
