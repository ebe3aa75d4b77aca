"""Shared memory, through which a loader's workers hand over their batches: how many fit, and what if it is full."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from accelerate import PartialState
from torch.utils.data import get_worker_info

from utils import UserError, brief_error, size


SHARED_MEMORY = Path("/dev/shm")  # Linux has a file system for it; Docker gives a container 64 MiB
SHARED_MEMORY_REMEDY = "give the container more (docker run --shm-size=2g), or choose --dataloader_num_workers 0"
PREFETCH_FACTOR = 2  # batches that each worker has ready
Tensors = TypeVar("Tensors", bound=Mapping[str, torch.Tensor])


def workers_that_fit(num_workers: int, batch_bytes: int, num_processes: int) -> int:
    """At most `num_workers` for each process: as many as shared memory has room for. Warns if that is fewer.

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


def share(tensors: Tensors) -> Tensors:
    """Put a batch's tensors into shared memory if this is a loader's worker.

    torch's queue would do that too, but later and in a thread whose errors nobody sees: with the memory full, the
    training process would wait for the batch forever.
    """
    if get_worker_info() is not None:
        try:
            for tensor in tensors.values():
                tensor.share_memory_()
        except RuntimeError as error:
            raise UserError(f"shared memory is full ({brief_error(error)}): {SHARED_MEMORY_REMEDY}") from None
    return tensors


def ignore_lost_reader(worker_id: int) -> None:
    """Keep a worker quiet when the training process hangs up; a DataLoader calls it in each worker at its start.

    If another worker dies, the training process may be in the middle of taking a batch from this one. The thread that
    hands out shared memory would print a traceback beside the one line that says what happened.
    """
    report_others = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            report_others(kind, error, traceback)

    sys.excepthook = report
