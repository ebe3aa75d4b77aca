"""What benchmarks/step.py measures of a step: seconds, how long the GPU was busy, kernels, operations, memory."""

import gc
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass
class Step:
    seconds: float
    loss: float
    grad_norm: float


@dataclass
class Activity:
    """Of a GPU in one step."""

    busy_seconds: float  # while at least one kernel or copy ran
    kernels: int
    copies: int  # and memsets


def clock() -> float:
    """Seconds: of the clock on a GPU, of this process's processor time on a CPU, which other programs may use too."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class StepWatch:
    """Told when a step begins and ends. It takes the time, and where `profiles` is set what the GPU did."""

    def __init__(self) -> None:
        self.profiles = False
        self.seconds: list[float] = []
        self.activity: Activity | None = None

    def begin(self) -> None:
        if self.profiles:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports on stderr that it starts and stops
            self.profiler = profile(activities=[ProfilerActivity.CUDA])
            self.profiler.start()
        self.start = clock()

    def end(self) -> None:
        self.seconds.append(clock() - self.start)
        if self.profiles:
            self.profiler.stop()
            self.activity = device_activity(self.profiler)


def device_activity(profiler: profile) -> Activity:
    """What ran on the GPU, from a trace of its activities. Streams overlap: their time counts once."""
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.time_range.elapsed_us() > 0
    ]
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in events)
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    return Activity(covered(spans) / 1e6, len(events) - copies, copies)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the spans' union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """The rate at which two large square matrices are multiplied, the best of ten."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(11):
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds[1:])


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def used_bytes() -> int:
    """Of the GPU, by all processes; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free
