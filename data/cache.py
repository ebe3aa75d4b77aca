"""The Arrow files that `datasets` keeps: how many processes make one, and errors of the folder that holds them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets.exceptions import DatasetGenerationError

from utils import UserError, brief_error, is_disk_full


MAX_PROCESSES = 16


def num_processes(num_records: int, records_per_process: int) -> int | None:
    """For `Dataset.map`: None, for no process beside this one, if there are fewer records than are worth another."""
    return min(os.cpu_count() or 1, MAX_PROCESSES, num_records // records_per_process) or None


@contextmanager
def naming_the_cache() -> Iterator[None]:
    """If the cache is full or may not be written, raise a UserError that names it and the remedy."""
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if not isinstance(cause, OSError) or not (is_disk_full(cause) or cause.errno in (errno.EACCES, errno.EPERM)):
            raise
        folder = datasets.config.HF_DATASETS_CACHE
        raise UserError(
            f"the datasets cache {folder} cannot be written ({brief_error(cause)}): make room there, or let the "
            "environment variable HF_DATASETS_CACHE name a folder on another disk"
        ) from None
