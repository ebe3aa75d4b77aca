"""What a run uses of its machine, and what it runs on."""

import platform
import resource
from importlib.metadata import version
from importlib.util import find_spec

import psutil
import torch
from accelerate import Accelerator


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


def environment(accelerator: Accelerator) -> dict[str, str | int]:
    """Device, strategy and versions, for run.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    # DeepSpeed need not be installed.
    versions = {package: version(package) for package in PACKAGES if find_spec(package)}
    return {
        "python": platform.python_version(),
        "device": device,
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **versions,
    }
