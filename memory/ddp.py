"""DistributedDataParallel: what it adds to the memory of one process.

At its start the first process sends all weights to the others, in copies of many at a time. From then on each gradient
exists twice, by itself and in a bucket.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from memory.record import Allocation, Record
from memory.work import Operation


# torch.nn.parallel.DistributedDataParallel: the bucket that is ready first is small, so that its reduction starts
# early (dist._DEFAULT_FIRST_BUCKET_BYTES), the others hold bucket_cap_mb.
DDP_FIRST_BUCKET_BYTES = 2**20
DDP_BUCKET_BYTES = 25 * 2**20
# Weights and buffers are sent in pieces of this size; two are under way (broadcast_coalesced, torch/csrc/distributed/
# c10d/reducer.cpp and comm.cpp). A piece of one tensor is no copy.
BROADCAST_BYTES, MAX_UNDER_WAY = 250 * 2**20, 2


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


def broadcast_sizes(sizes_bytes: Iterable[tuple[str, int]]) -> list[int]:
    """Bytes of each copy that is made to send tensors, given their dtypes and bytes, in order. Those of one dtype fill
    a piece until it holds BROADCAST_BYTES; the piece whose first tensor comes first is sent first."""
    pieces: list[list[int]] = []
    filling: dict[str, list[int]] = {}
    for dtype, nbytes in sizes_bytes:
        if dtype not in filling:
            pieces.append(filling.setdefault(dtype, []))
        filling[dtype].append(nbytes)
        if sum(filling[dtype]) >= BROADCAST_BYTES:
            del filling[dtype]
    return [sum(piece) if len(piece) > 1 else 0 for piece in pieces]


def with_ddp(record: Record, world_size: int, on_gpu: bool = True) -> Record:
    """The record of a process that at the end of loading also gets the weights, from then on holds DDP's buckets, and
    sends them to the others.

    On a CPU the weights' copies are left out: gloo makes more of them, and a measurement begins after them.
    `gradient_as_bucket_view` is off by default: each gradient exists twice, by itself and in a bucket.
    """
    loaded = [
        a for nbytes, a in record.events if nbytes > 0 and a.op == "load" and a.category in ("weights", "trained")
    ]
    trained = [4 * math.prod(a.shape) for a in loaded if a.category == "trained"]  # fp32
    first = 1 + max(a.start for a in loaded)
    sizes = ddp_bucket_sizes(trained)
    added = broadcast([(a.dtype, a.nbytes) for a in loaded], first) if on_gpu else []
    for nbytes in sizes:
        added.append((nbytes, communication(nbytes, "DDP bucket", first + len(added))))

    def moved(index: int | None) -> int | None:
        return index if index is None or index < first else index + len(added)

    copies = {a: replace(a, start=moved(a.start), end=moved(a.end)) for nbytes, a in record.events}
    events = [(nbytes, copies[allocation]) for nbytes, allocation in record.events]
    events[first:first] = added
    phase_starts = [(index if phase == "load" else moved(index), phase) for index, phase in record.phase_starts]
    return Record(events, phase_starts, record.notes, with_reduction(record.work, sum(sizes), world_size))


def broadcast(sizes_bytes: list[tuple[str, int]], first: int) -> list[tuple[int, Allocation]]:
    """The events of sending tensors; the first one has the number `first`."""
    events, under_way = list[tuple[int, Allocation]](), list[Allocation]()

    def end_oldest() -> None:
        oldest = under_way.pop(0)
        oldest.end = first + len(events)
        events.append((-oldest.nbytes, oldest))

    for nbytes in filter(None, broadcast_sizes(sizes_bytes)):
        if len(under_way) == MAX_UNDER_WAY:
            end_oldest()
        under_way.append(communication(nbytes, "broadcast", first + len(events)))
        events.append((nbytes, under_way[-1]))
    while under_way:
        end_oldest()
    return events


def communication(nbytes: int, op: str, start: int) -> Allocation:
    return Allocation(nbytes, (nbytes,), "uint8", op, "", "load", start, "communication")


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
