"""Replays allocations through the rules of PyTorch's CUDA caching allocator: what it reserves, and where memory ends.

    replay = replay_events([(4096, "a"), (2**21, "b"), (-4096, "a")], budget_bytes=24 * 2**30)
    replay.peak_reserved_bytes, replay.oom

The rules are those of c10/cuda/CUDACachingAllocator.cpp, the sizes those of c10/core/AllocatorConfig.h (PyTorch 2.13).
A request is rounded up to 512 bytes and served by the smallest free block that holds it. What is left of the block is
split off if it is worth it. Where no block fits, a segment comes from the device: 2 MiB for requests of up to 1 MiB
(the small pool), 20 MiB for those under 10 MiB, and above that the request itself, rounded up to 2 MiB. A freed block
joins its free neighbours; segments stay until memory runs out, when those without a used block are given back.

With `expandable_segments` each pool has one segment instead, of as much address space as it wants, and what grows is
the part of it that has memory behind it, in pages. Each stream has pools of its own. That a block waits for the
streams that use it, graphs and other processes are not modelled.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field


MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = 2**20  # the largest that the small pool serves
SMALL_SEGMENT_BYTES = 2 * 2**20
MIN_LARGE_REQUEST_BYTES = 10 * 2**20  # from here on a segment is as large as its first request
LARGE_SEGMENT_BYTES = 20 * 2**20
LARGE_ROUNDING_BYTES = 2 * 2**20
# A pool's expandable segment lies in an address range of its own: more than any device has, and whole pages.
EXPANDABLE_RANGE_BYTES = 2**24 * LARGE_SEGMENT_BYTES


@dataclass
class OutOfMemory:
    """The event whose request could not be served, and what the allocator held then."""

    event_index: int
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass
class Replay:
    """What `torch.cuda.max_memory_allocated` and `max_memory_reserved` would say; up to the OOM if there is one."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    oom: OutOfMemory | None = None


@dataclass(frozen=True, slots=True)
class SegmentChange:
    """Memory that came from the device or went back to it; `action` is PyTorch's name for that: segment_alloc or
    segment_free, in expandable segments segment_map or segment_unmap."""

    action: str
    address: int
    nbytes: int
    stream: int


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment. `mapped` is False for address space without memory behind it."""

    address: int
    nbytes: int
    pool: "Pool"
    previous: "Block | None" = None
    next: "Block | None" = None
    is_free: bool = True
    mapped: bool = True


@dataclass(slots=True, eq=False)
class Pool:
    """The free blocks of small or of large requests, by size and then by address."""

    is_small: bool
    stream: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)
    by_address: dict[int, Block] = field(default_factory=dict)
    unmapped: list[int] = field(default_factory=list)  # addresses, in order

    @property
    def page_bytes(self) -> int:
        return SMALL_SEGMENT_BYTES if self.is_small else LARGE_SEGMENT_BYTES

    def add(self, block: Block) -> None:
        self.by_address[block.address] = block
        if block.mapped:
            insort(self.free, (block.nbytes, block.address))
        else:
            insort(self.unmapped, block.address)

    def remove(self, block: Block) -> None:
        del self.by_address[block.address]
        if block.mapped:
            del self.free[bisect_left(self.free, (block.nbytes, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]

    def best_fit(self, nbytes: int) -> Block | None:
        """The smallest free block of at least `nbytes`; one that can still grow counts with the room it has."""
        index = bisect_left(self.free, (nbytes, 0))
        if index == len(self.free):
            return None
        block = self.by_address[self.free[index][1]]
        for _, address in self.free[index + 1 :] if _can_grow(block) else ():
            if not _can_grow(block) or _room(self.by_address[address]) >= _room(block):
                break
            block = self.by_address[address]
        return block


def _can_grow(block: Block) -> bool:
    return block.next is not None and not block.next.mapped


def _room(block: Block) -> int:
    return block.nbytes + (block.next.nbytes if _can_grow(block) else 0)


class CachingAllocator:
    """A device's allocator. `malloc` returns None where `budget_bytes` (None: no end) do not suffice."""

    def __init__(self, budget_bytes: int | None = None, expandable_segments: bool = False) -> None:
        self.budget_bytes = budget_bytes
        self.expandable = expandable_segments
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.pools: dict[tuple[int, bool], Pool] = {}  # by stream and size
        self.segment_changes: list[SegmentChange] = []
        self._next_address = LARGE_ROUNDING_BYTES

    def malloc(self, nbytes: int, stream: int = 0) -> Block | None:
        nbytes = max(MIN_BLOCK_BYTES, _round_up(nbytes, MIN_BLOCK_BYTES))
        is_small = nbytes <= SMALL_REQUEST_BYTES
        pool = self.pools.setdefault((stream, is_small), Pool(is_small, stream))
        block = pool.best_fit(nbytes) or self._grow(pool, nbytes)
        if block is None:
            self.release_cached()
            block = self._grow(pool, nbytes)
            if block is None:
                return None
        pool.remove(block)
        self._split(block, nbytes)
        block.is_free = False
        self.allocated_bytes += block.nbytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        self.allocated_bytes -= block.nbytes
        block.is_free = True
        self._merge(block)
        block.pool.add(block)

    def release_cached(self) -> None:
        """Give the device back every segment, or page of an expandable one, in which nothing is used."""
        for pool in self.pools.values():
            for address in [address for _, address in pool.free]:
                block = pool.by_address[address]
                if self.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.nbytes
                    self._note("segment_free", block.address, block.nbytes, pool)

    def _grow(self, pool: Pool, nbytes: int) -> Block | None:
        """Memory from the device: a free block of at least `nbytes`, or None."""
        if self.expandable:
            return self._expand(pool, nbytes)
        segment_bytes = _segment_bytes(nbytes)
        if not self._reserve(segment_bytes):
            return None
        block = Block(self._next_address, segment_bytes, pool)
        self._note("segment_alloc", block.address, segment_bytes, pool)
        self._next_address += segment_bytes + LARGE_ROUNDING_BYTES
        pool.add(block)
        return block

    def _reserve(self, nbytes: int) -> bool:
        if self.budget_bytes is not None and self.reserved_bytes + nbytes > self.budget_bytes:
            return False
        self.reserved_bytes += nbytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _note(self, action: str, address: int, nbytes: int, pool: Pool) -> None:
        self.segment_changes.append(SegmentChange(action, address, nbytes, pool.stream))

    def _split(self, block: Block, nbytes: int) -> None:
        """Cut the block down to `nbytes` if what is left is worth a block of its own."""
        left = block.nbytes - nbytes
        worth_it = left >= MIN_BLOCK_BYTES if block.pool.is_small or self.expandable else left > SMALL_REQUEST_BYTES
        if worth_it:
            block.pool.add(_cut(block, nbytes))

    def _merge(self, block: Block) -> None:
        """Take in the free neighbours that are mapped as the block is. The block must be in no list."""
        for neighbour in (block.previous, block.next):
            if neighbour is None or not neighbour.is_free or neighbour.mapped != block.mapped:
                continue
            block.pool.remove(neighbour)
            if neighbour is block.previous:
                block.address, block.previous = neighbour.address, neighbour.previous
            else:
                block.next = neighbour.next
            block.nbytes += neighbour.nbytes
        if block.previous is not None:
            block.previous.next = block
        if block.next is not None:
            block.next.previous = block

    def _expand(self, pool: Pool, nbytes: int) -> Block | None:
        """Map pages at the lowest address where free and unmapped blocks in a row have the room."""
        if not pool.unmapped:
            start = EXPANDABLE_RANGE_BYTES * (1 + list(self.pools.values()).index(pool))
            pool.add(Block(start, EXPANDABLE_RANGE_BYTES, pool, mapped=False))
        for address in pool.unmapped:
            block = pool.by_address[address]
            if block.previous is not None and block.previous.is_free:
                block = block.previous
            if _row_bytes(block) >= nbytes:
                break
        if not block.mapped:
            block = self._map(block, nbytes)
        while block is not None and block.nbytes < nbytes:
            block = self._map(block.next, nbytes - block.nbytes)
        return block

    def _map(self, block: Block, nbytes: int) -> Block | None:
        """Put memory behind the first `nbytes` of an unmapped block; returns the free block that they have joined."""
        nbytes = _round_up(min(nbytes, block.nbytes), block.pool.page_bytes)
        if not self._reserve(nbytes):
            return None
        block.pool.remove(block)
        if block.nbytes > nbytes:
            block.pool.add(_cut(block, nbytes))
        block.mapped = True
        self._note("segment_map", block.address, nbytes, block.pool)
        self._merge(block)
        block.pool.add(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Take the memory from a free block's whole pages."""
        page_bytes = block.pool.page_bytes
        start = _round_up(block.address, page_bytes)
        end = (block.address + block.nbytes) // page_bytes * page_bytes
        if start >= end:
            return
        block.pool.remove(block)
        if end < block.address + block.nbytes:
            block.pool.add(_cut(block, end - block.address))
        if start > block.address:
            whole_pages = _cut(block, start - block.address)
            block.pool.add(block)
            block = whole_pages
        self.reserved_bytes -= block.nbytes
        block.mapped = False
        self._note("segment_unmap", block.address, block.nbytes, block.pool)
        self._merge(block)
        block.pool.add(block)


def replay_events(
    events: Iterable[tuple[int, Hashable] | tuple[int, Hashable, int]],
    budget_bytes: int | None = None,
    expandable_segments: bool = False,
    release_before: Collection[int] = (),
) -> Replay:
    """Replay (bytes, key) or (bytes, key, stream): positive bytes allocate under the key, negative ones free
    that allocation.

    Events of 0 bytes are passed over. Before the events `release_before` the cache is given back, as empty_cache does.
    The replay ends at the first request that `budget_bytes` cannot serve.
    """
    allocator = CachingAllocator(budget_bytes, expandable_segments)
    blocks: dict[Hashable, Block] = {}
    oom = None
    for index, (nbytes, key, *stream) in enumerate(events):
        if index in release_before:
            allocator.release_cached()
        if nbytes < 0:
            allocator.free(blocks.pop(key))
        elif nbytes > 0:
            block = allocator.malloc(nbytes, *stream)
            if block is None:
                oom = OutOfMemory(index, nbytes, allocator.allocated_bytes, allocator.reserved_bytes)
                break
            blocks[key] = block
    return Replay(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes, oom)


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def _segment_bytes(nbytes: int) -> int:
    """What is asked of the device to serve a rounded request."""
    if nbytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if nbytes < MIN_LARGE_REQUEST_BYTES else _round_up(nbytes, LARGE_ROUNDING_BYTES)


def _cut(block: Block, nbytes: int) -> Block:
    """Shorten a block to `nbytes` and return the rest, which is in no list yet."""
    rest = Block(block.address + nbytes, block.nbytes - nbytes, block.pool, block, block.next, True, block.mapped)
    if block.next is not None:
        block.next.previous = rest
    block.next, block.nbytes = rest, nbytes
    return rest


def _row_bytes(block: Block | None) -> int:
    """The bytes of free and unmapped blocks in a row from here on."""
    total = 0
    while block is not None and block.is_free:
        total, block = total + block.nbytes, block.next
    return total
