"""Measures what memory/predict.py predicts: on a GPU by its allocator's counters, on a CPU by the profiler."""

from typing import Any

import torch

from memory.config import strategy_of
from memory.measure_cpu import measure_strategy, measure_training
from memory.measure_gpu import measure_gpu
from step import StepConfig


def measure(config: StepConfig) -> dict[str, Any]:
    """A ProbeConfig's peak in bytes and what the device has to have. Running out of memory is a result: `oom` tells.

    Raises:
        UserError: the GPU is in use, or the strategy cannot be measured here.
    """
    strategy = strategy_of(config)
    if config.device == "cuda":
        return measure_gpu(config, strategy, config.images_per_sample, emulated_limit(config))
    if strategy.name == "single":
        peak_bytes = measure_training(config, config.images_per_sample).peak_bytes
    else:
        peak_bytes = measure_strategy(config, strategy, config.images_per_sample)
    return {
        "peak_allocated_bytes": peak_bytes,
        "peak_reserved_bytes": peak_bytes,
        "device_bytes": peak_bytes,
    }


def emulated_limit(config: StepConfig) -> int | None:
    """The budget, where it is smaller than the card that is there."""
    capacity_bytes = torch.cuda.get_device_properties(0).total_memory
    return config.budget_bytes if config.budget_bytes < capacity_bytes else None
