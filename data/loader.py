"""From a data set to the loader of its micro-batches: packed or not, with bad samples skipped or not."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, get_worker_info
from transformers import PreTrainedConfig, ProcessorMixin

from data.batching import NamingCollator, TrainCollator, UpdateBatchSampler, column_values
from data.dataset import ConversationDataset
from data.packing import PackedCollator, PackedDataset, pack
from data.skipping import CheckedCollator, CheckedUpdates
from data.worst_case import Row, longest_row, with_rows_of, worst_case_batch
from memory_report import size
from utils import UserError


SHARED_MEMORY = Path("/dev/shm")  # Linux has a file system for it; Docker gives a container 64 MiB
SHARED_MEMORY_REMEDY = "give the container more (docker run --shm-size=2g), or choose --dataloader_num_workers 0"
PREFETCH_FACTOR = 2  # batches that each worker has ready


def build_loader(
    config: Any,
    dataset: ConversationDataset,
    processor: ProcessorMixin,
    model_config: PreTrainedConfig,
    num_processes: int,
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
        config.group_by_length,
    )
    collator = NamingCollator(collator_class(processor, config.max_seq_len))
    if config.on_bad_sample == "skip":
        dataset, collator = CheckedUpdates(dataset), CheckedCollator(collator)
    longest = longest_row(records, num_tokens, processor.num_image_tokens)
    batch_bytes = largest_batch_bytes(model_config, config, longest)
    num_workers = workers_that_fit(config.dataloader_num_workers, batch_bytes, num_processes)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=SharingCollator(collator),
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making its iterator must not change the numbers that dropout draws
    )
    return loader, sampler, longest


def largest_batch_bytes(model_config: PreTrainedConfig, config: Any, longest: Row) -> int:
    """Bytes of the largest micro-batch that can come. `config` is train.py's."""
    with torch.device("meta"):
        batch = worst_case_batch(model_config, with_rows_of(config, longest.num_tokens), longest.num_images)
    return sum(tensor.nbytes for tensor in batch.values())


def workers_that_fit(num_workers: int, batch_bytes: int, num_processes: int) -> int:
    """At most `num_workers` for each of the processes: as many as shared memory has room for. Says so if it is less.

    All batches that are ready lie there, and two in the training process: accelerate fetches one ahead.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return num_workers
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    batches_that_fit = free_bytes // (batch_bytes * num_processes)
    fitting = min(num_workers, max(0, batches_that_fit - 2) // PREFETCH_FACTOR)
    if fitting < num_workers:
        needed_bytes = (num_workers * PREFETCH_FACTOR + 2) * batch_bytes * num_processes
        free, needed = size(free_bytes), size(needed_bytes)
        PartialState().print(
            f"warning: {SHARED_MEMORY} (shared memory) has {free} free, {num_workers} data workers may need {needed}: "
            f"going on with {fitting}, which may be slower. More for a container: docker run --shm-size=2g",
            file=sys.stderr,
        )
    return fitting


class SharingCollator:
    """What `collator` makes of samples, in shared memory where a worker makes it.

    Left to torch, a worker's queue does that later, in a thread whose error nobody hears of: where the memory is full
    the training process would wait for the batch forever.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: Any) -> dict[str, Any]:
        batch = self.collator(samples)
        if get_worker_info() is not None:
            try:
                for value in batch.values():
                    if isinstance(value, torch.Tensor):
                        value.share_memory_()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"shared memory is full ({reason}): {SHARED_MEMORY_REMEDY}") from None
        return batch
