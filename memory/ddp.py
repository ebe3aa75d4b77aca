"""DistributedDataParallel's buckets: what it adds to the memory of one process."""

import math
from collections.abc import Iterable
from dataclasses import replace

from memory.record import Allocation, Record
from memory.work import Operation


# torch.nn.parallel.DistributedDataParallel: the bucket that is ready first is small, so that its reduction starts
# early (dist._DEFAULT_FIRST_BUCKET_BYTES), the others hold bucket_cap_mb.
DDP_FIRST_BUCKET_BYTES = 2**20
DDP_BUCKET_BYTES = 25 * 2**20


def ddp_bucket_sizes(parameter_sizes_bytes: Iterable[int]) -> list[int]:
    """Bytes of each of DDP's buckets, given those of the trained parameters in the model's order.

    Buckets fill from the last parameter on and are closed once they hold their limit
    (torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size). In MiB: parameters of 20, 10, 0.5 and
    0.75 give buckets of 1.25 (closed above 1) and 30 (closed above 25).
    """
    buckets, current, limit = [], 0, DDP_FIRST_BUCKET_BYTES
    for nbytes in reversed(list(parameter_sizes_bytes)):
        current += nbytes
        if current >= limit:
            buckets.append(current)
            current, limit = 0, DDP_BUCKET_BYTES
    return [*buckets, current] if current else buckets


def with_ddp_buckets(record: Record, world_size: int) -> Record:
    """The record of a process that also holds DDP's buckets, from the end of loading on, and sends them to the others.

    `gradient_as_bucket_view` is off by default: each gradient exists twice, by itself and in a bucket.
    """
    trained = [4 * math.prod(a.shape) for nbytes, a in record.events if nbytes > 0 and a.category == "trained"]  # fp32
    first_step = next(index for index, phase in record.phase_starts if phase != "load")
    sizes = ddp_bucket_sizes(trained)
    buckets = [
        Allocation(nbytes, (nbytes // 4,), "float32", "DDP bucket", "", "load", first_step + i, "communication")
        for i, nbytes in enumerate(sizes)
    ]

    def moved(index: int | None) -> int | None:
        return index if index is None or index < first_step else index + len(buckets)

    copies = {a: replace(a, start=moved(a.start), end=moved(a.end)) for nbytes, a in record.events}
    events = [(nbytes, copies[allocation]) for nbytes, allocation in record.events]
    events[first_step:first_step] = [(bucket.nbytes, bucket) for bucket in buckets]
    phase_starts = [(index if phase == "load" else moved(index), phase) for index, phase in record.phase_starts]
    return Record(events, phase_starts, record.notes, with_reduction(record.work, sum(sizes), world_size))


def with_reduction(work: list[list[Operation]], nbytes: int, world_size: int) -> list[list[Operation]]:
    """The operations of an update whose gradients are summed over all processes, in a ring: each sends and receives
    nearly all of them twice. It ends before they are clipped."""
    if not work or world_size == 1:
        return work
    *before, last = work
    sent_bytes = 2 * nbytes * (world_size - 1) // world_size
    reduction = Operation("transfer", "all_reduce", "backward", False, sent_bytes)
    first = next(i for i, operation in enumerate(last) if operation.phase == "step")
    return [*before, [*last[:first], reduction, *last[first:]]]
