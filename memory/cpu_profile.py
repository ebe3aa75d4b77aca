"""Read what the CPU's allocator did from PyTorch's profiler: nothing else counts it.

    with profile_memory() as profiler:
        step()
    peak_bytes = bytes_in_use_before + rise(memory_events(profiler))

PyTorch's memory counters exist for GPUs alone.
"""

import gc
import os
from collections.abc import Iterable

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from models.fsdp2 import own_part


def profile_memory() -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports on stderr that it starts and stops
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def memory_events(profiler: profile) -> list[int]:
    """The allocator's events in the order of time: bytes of each allocation (positive) and free (negative). The
    profiler attaches them to the operators that made them."""
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    found = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [nbytes for _, nbytes in sorted(found, key=lambda pair: pair[0])]


def rise(events: list[int]) -> int:
    """The most bytes in use after any of the events, counted from those in use before them."""
    total = peak = 0
    for nbytes in events:
        total += nbytes
        peak = max(peak, total)
    return peak


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; a storage that several tensors share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_in_use(model: nn.Module) -> int:
    """Bytes of all tensors of this process, and of DDP's buckets, which no Python object holds.

    What a loader's workers have read ahead into shared memory is left out: the allocator did not make it.
    """
    gc.collect()
    sizes = {}
    for tensor in filter(lambda thing: issubclass(type(thing), torch.Tensor), gc.get_objects()):
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is None or own_part(part).is_shared():
                continue
            storage = own_part(part).untyped_storage()
            if storage.device.type != "meta":  # a fake tensor's, which has no memory
                sizes[storage.data_ptr()] = storage.nbytes()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        buckets = [bucket.buffer() for bucket in model.reducer._get_zeros_like_grad_buckets()]
        return sum(sizes.values()) + sum(bucket.nbytes for bucket in buckets)
    return sum(sizes.values())
