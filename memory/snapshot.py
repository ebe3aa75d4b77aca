"""A record as a memory snapshot of PyTorch: what torch.cuda.memory._dump_snapshot writes after a run on a GPU.

pytorch.org/memory_viz and torch/cuda/_memory_viz.py show it. The structure is that of torch.cuda.memory._snapshot
(PyTorch 2.13). Addresses and segments are those of the allocator's replay. Where PyTorch has the lines of a traceback
(`frames`), here are the tensor's operator and module, and then its phase and category.
"""

import pickle
from collections.abc import Iterator
from typing import Any

from memory.allocator import Block, CachingAllocator, SegmentChange
from memory.categories import TITLES
from memory.predict import PEFT_NAMES, cache_releases, has_expandable_segments
from memory.record import Allocation, Record


PROTOCOL = 4  # torch/utils/viz/MemoryViz.js reads 2 to 4
POOL = (0, 0)  # the one that is not a CUDA graph's


def snapshot_bytes(record: Record) -> bytes:
    """The snapshot of a GPU's record as the file that viewers open."""
    return pickle.dumps(snapshot(record), PROTOCOL)


def snapshot(record: Record) -> dict[str, Any]:
    """`device_traces`: what the allocator did, one list a device. `segments`: what it holds after that, at the end of
    the record; viewers go back from there."""
    allocator = CachingAllocator(expandable_segments=has_expandable_segments())
    releases = cache_releases(record)
    frames = Frames()
    blocks: dict[Allocation, Block] = {}
    trace: list[dict[str, Any]] = []
    for index, (nbytes, allocation) in enumerate(record.events):
        if index in releases:
            allocator.release_cached()
        if nbytes > 0:
            blocks[allocation] = allocator.malloc(nbytes, allocation.stream)
        trace += map(_segment_entry, allocator.segment_changes)
        allocator.segment_changes.clear()
        if nbytes > 0:
            trace.append(_entry("alloc", blocks[allocation], allocation, frames))
        elif nbytes < 0:
            block = blocks.pop(allocation)
            trace += [_entry(action, block, allocation, frames) for action in ("free_requested", "free_completed")]
            allocator.free(block)
    alive = {block: allocation for allocation, block in blocks.items()}
    return {"segments": list(_segments(allocator, alive, frames)), "device_traces": [trace]}


class Frames(dict):
    """The frames of allocations; those that are equal are one list, which keeps the file small."""

    def of(self, allocation: Allocation) -> list[dict[str, Any]]:
        form = f"{list(allocation.shape)} {allocation.dtype}"
        module = PEFT_NAMES.sub("", allocation.module) or "the step"
        inner, outer = (f"{allocation.op} {form}", module), (allocation.phase, TITLES[allocation.category])
        if (inner, outer) not in self:
            self[inner, outer] = [{"name": name, "filename": file, "line": 0} for name, file in (inner, outer)]
        return self[inner, outer]


def _entry(action: str, block: Block, allocation: Allocation, frames: Frames) -> dict[str, Any]:
    return {
        "action": action,
        "addr": block.address,
        "size": allocation.nbytes,
        "stream": allocation.stream,
        "pool_id": POOL,
        "frames": frames.of(allocation),
        "category": TITLES[allocation.category],
    }


def _segment_entry(change: SegmentChange) -> dict[str, Any]:
    # MemoryViz.js stops with an error if there are categories and none is "unknown".
    return {
        "action": change.action,
        "addr": change.address,
        "size": change.nbytes,
        "stream": change.stream,
        "pool_id": POOL,
        "frames": [],
        "category": "unknown",
    }


def _segments(allocator: CachingAllocator, alive: dict[Block, Allocation], frames: Frames) -> Iterator[dict[str, Any]]:
    """Each stretch of memory that is the device's, with its blocks in order."""
    free = [block for pool in allocator.pools.values() for block in pool.by_address.values()]
    for head in sorted([*free, *alive], key=lambda block: block.address):
        if not head.mapped or (head.previous is not None and head.previous.mapped):
            continue
        blocks, block = [], head
        while block is not None and block.mapped:
            blocks.append(_block(block, alive.get(block), frames))
            block = block.next
        in_use = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
        yield {
            "device": 0,
            "address": head.address,
            "total_size": sum(block["size"] for block in blocks),
            "allocated_size": in_use,
            "active_size": in_use,
            "stream": head.pool.stream,
            "segment_type": "small" if head.pool.is_small else "large",
            "segment_pool_id": POOL,
            "is_expandable": allocator.expandable,
            "frames": [],
            "blocks": blocks,
        }


def _block(block: Block, allocation: Allocation | None, frames: Frames) -> dict[str, Any]:
    if allocation is None:
        return {"address": block.address, "size": block.nbytes, "requested_size": 0, "state": "inactive", "frames": []}
    return {
        "address": block.address,
        "size": block.nbytes,
        "requested_size": allocation.nbytes,
        "state": "active_allocated",
        "frames": frames.of(allocation),
    }
