"""Measure how fast this machine's GPU is: the figures of memory/gpus.py's Speed. For a process of its own."""

from collections.abc import Callable

import torch

from memory.gpus import Speed
from utils import MIB


PRODUCT_SIDE = 8192  # of square matrices: 128 MiB each in 16 bits
COPY_BYTES = 512 * MIB
REPEATS = 20
NUM_KERNELS = 800  # a GPU's queue holds 1024


def measure_speed() -> Speed:
    matrix = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device="cuda")
    half = matrix.bfloat16()
    large, copy = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    pinned = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    flops = 2 * PRODUCT_SIDE**3
    return Speed(
        matmul_flops=flops / seconds_of(lambda: half @ half),
        fp32_flops=flops / seconds_of(lambda: matrix @ matrix),
        memory_bytes_per_second=2 * COPY_BYTES / seconds_of(lambda: copy.copy_(large)),
        pcie_bytes_per_second=COPY_BYTES / seconds_of(lambda: copy.copy_(pinned, non_blocking=True)),
        kernel_seconds=measure_kernel(lambda: half @ half),
        num_multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
    )


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one of many runs, by the GPU's own clock. The first one, which may load kernels, does not count."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / REPEATS


def measure_kernel(run_long: Callable[[], object]) -> float:
    """Seconds of a kernel that has nearly nothing to do. The host issues the whole row while the GPU still works on
    something long, so that the GPU never waits for it."""
    number = torch.zeros((), device="cuda")
    number.add_(1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(REPEATS):
        run_long()
    start.record()
    for _ in range(NUM_KERNELS):
        number.add_(1)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / NUM_KERNELS
