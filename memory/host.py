"""Host RAM: what training needs of it, all processes of one computer together.

    host_breakdown(trace_strategy(config, strategy), num_workers=2, world_size=strategy.world_size)  # bytes by purpose

What DeepSpeed offloads comes from its trace. Pinned memory is allocated in blocks of a power of two, which is why an
offloaded run needs more than its tensors. Loading adds nothing: weights in the compute dtype are pages of the
checkpoint's file, which the system can drop.
"""

from collections import Counter

from data.sharing import PREFETCH_FACTOR
from memory.placed import PlacedRecord
from memory.record import Record


# Resident memory of a process with torch, transformers, peft and deepspeed, besides what it offloads. On a CPU it was
# measured with Python 3.11 and PyTorch 2.13 before a model is loaded; with CUDA it is what a step of MGM-2B left on an
# H100's host, 1.97 to 2.10 GB (PyTorch 2.11, CUDA 13; results/gpu/matrix.json).
PROCESS_BYTES = {"cpu": 531 * 2**20, "cuda": 1_990_000_000}
# A data worker is forked and shares its parent's pages until it writes to them: 9 MiB of its own at its first batch,
# more as reference counts change. An allowance, not a measurement.
WORKER_BYTES = 64 * 2**20


def host_breakdown(
    record: PlacedRecord, num_workers: int, world_size: int = 1, device_type: str = "cuda"
) -> dict[str, int]:
    """Bytes of host memory by purpose while the steps run, for `world_size` processes on one host, each with
    `num_workers` data workers.

    The tensors are those of the peaks of pinned and of ordinary memory. On a CPU the device's are the host's too.
    """
    sums = Counter({"process": PROCESS_BYTES[device_type]})
    for part in (record.pinned, record.host, *([record.device] if device_type == "cpu" else [])):
        sums.update(part.breakdown())
    sums["pinned_rounding"] = pinned_blocks_bytes(record.pinned) - record.pinned.peak_bytes
    sums["workers"] = num_workers * WORKER_BYTES
    sums["batches"] = num_workers * PREFETCH_FACTOR * batch_bytes(record.device)
    return {purpose: world_size * nbytes for purpose, nbytes in sums.items() if nbytes}


def batch_bytes(record: Record) -> int:
    """Bytes of one batch on the device."""
    return sum(nbytes for nbytes, allocation in record.events if nbytes > 0 and allocation.category == "batch")


def pinned_blocks_bytes(record: Record) -> int:
    """Bytes that PyTorch's pinned-memory allocator holds at the end of a record.

    It rounds each request up to a power of two and keeps what is freed for the next request of that size
    (ATen/core/CachingHostAllocator.h, allocate and free; `pinned_max_round_threshold` is without limit by default). In
    MiB: 3, 5, freeing 3, 4, 2 take blocks of 4, 8, none (the first one again) and 2.
    """
    total, unused = 0, Counter()
    for nbytes, allocation in record.events:
        block_bytes = 1 << max(allocation.nbytes - 1, 0).bit_length()
        if nbytes < 0:
            unused[block_bytes] += 1
        elif nbytes > 0 and unused[block_bytes]:
            unused[block_bytes] -= 1
        elif nbytes > 0:
            total += block_bytes
    return total
