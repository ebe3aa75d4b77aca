"""What a run uses of its machine, and what it runs on."""

import resource

import psutil
import torch
from accelerate import Accelerator

from utils import environment


PACKAGES = ("torch", "accelerate", "transformers", "peft", "deepspeed", "datasets")


def memory_bytes() -> dict[str, int]:
    """The process's resident memory; with a GPU also what PyTorch holds there."""
    rss = {"rss_bytes": psutil.Process().memory_info().rss}
    if not torch.cuda.is_available():
        return rss
    gpu = {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
    }
    return gpu | rss


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """On a GPU the peak since the last reset; on a CPU the process's highest resident memory so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_environment(accelerator: Accelerator) -> dict[str, str | int]:
    """Device, strategy and versions, for run.json."""
    return environment(*PACKAGES) | {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
