"""What else to know of a prediction for a GPU: kernels that the machine which predicts lacks, and what of the card is
not known."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from memory.config import ProbeConfig
from memory.gpus import Gpu
from memory.margin import MEMORY_MARGIN, device_margin
from memory.record import Record
from utils import size


# What transformers warns of when it takes its own PyTorch code for a kernel of a package.
FALLBACK = re.compile(r"`(\w+)` is falling back .* because `([\w.-]+)` is not installed")
GROUPED_PRODUCT = "aten._grouped_mm."


@contextmanager
def noted(record: Record, device_type: str) -> Iterator[None]:
    """A context for a trace. What there is to note of it is in `record.notes` afterwards."""
    functions: dict[str, set[str]] = defaultdict(set)  # by the package that has a kernel for each
    warn = logging.Logger.warning_once

    def warning_once(logger: logging.Logger, message: str, *args: Any, **kwargs: Any) -> None:
        if found := FALLBACK.search(str(message)):
            functions[found[2]].add(found[1])
        warn(logger, message, *args, **kwargs)

    with patch.object(logging.Logger, "warning_once", warning_once):
        yield
    if device_type == "cuda":
        record.notes += [fallback_note(package, names) for package, names in sorted(functions.items())]
        record.notes += grouped_note(record)


def fallback_note(package: str, functions: set[str]) -> str:
    return (
        f"{package} is not installed here: {', '.join(sorted(functions))} counted as transformers' own PyTorch code. "
        f"With {package} a step needs other memory, as a rule less."
    )


def grouped_note(record: Record) -> list[str]:
    if not any(allocation.op.startswith(GROUPED_PRODUCT) for _, allocation in record.events):
        return []
    return [
        "The experts' grouped matrix products count without what a GPU's kernel for them needs besides the result."
    ]


def card_notes(gpu: Gpu, device_bytes: int, host_bytes: int) -> list[str]:
    """What to keep in mind where a step just fits that needs so much of the device and of the host."""
    notes = []
    if gpu.margin_bytes:
        margin = size(gpu.margin_bytes)
        notes.append(f"Nobody has measured CUDA's own memory on this card ({gpu.name}): up to {margin} may differ.")
    if gpu.shares_host_memory:
        both = size(device_bytes + host_bytes)
        notes.append(f"This card shares its memory with the host: both together need {both} of it.")
    return notes


def offload_note(config: ProbeConfig) -> list[str]:
    if config.strategy != "zero3" or config.offload != "none" or config.config_file is not None:
        return []
    file = "accelerate_configs/zero3.yaml"
    return [f"Nothing is offloaded here. {file} offloads weights and optimizer states: --config_file {file}."]


def allocator_note(config: ProbeConfig) -> list[str]:
    """Where the allocator keeps more than its replay."""
    if (margin := device_margin(config.strategy, config.loss, config.world_size)) == MEMORY_MARGIN:
        return []
    flag = "--strategy zero3" if config.strategy == "zero3" else "--loss full"
    return [f"With {flag} the allocator may hold up to {margin:.0%} more of the device than this."]
