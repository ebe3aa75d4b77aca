"""Measure what memory/predict.py predicts: on a GPU by its allocator's counters, on a CPU by the profiler."""

from typing import Any

import torch

from memory.config import ProbeConfig
from memory.measure_cpu import measure_cpu
from memory.measure_gpu import measure_gpu


def measure(config: ProbeConfig) -> dict[str, Any]:
    """The peak in bytes and what the device needs in all. Running out of memory is a result: `oom` has the message.

    Raises:
        UserError: the GPU is in use, or the strategy cannot be measured here.
    """
    if config.device == "cuda":
        return measure_gpu(config, config.launch, emulated_limit(config))
    peak_bytes = measure_cpu(config, config.launch)
    return {"peak_allocated_bytes": peak_bytes, "peak_reserved_bytes": peak_bytes, "device_bytes": peak_bytes}


def emulated_limit(config: ProbeConfig) -> int | None:
    """The budget where it is smaller than this machine's card, else None."""
    capacity_bytes = torch.cuda.get_device_properties(0).total_memory
    return config.budget_bytes if config.budget_bytes < capacity_bytes else None
