"""Errors of the folder in which `datasets` keeps its Arrow files."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets.exceptions import DatasetGenerationError

from utils import UserError, brief_error, is_disk_full


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
