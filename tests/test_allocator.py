"""The replay against sequences worked out by hand from the allocator's rules, and against what must always hold."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest

from memory.allocator import CachingAllocator, Replay, replay_events


KIB, MIB = 2**10, 2**20
ROOT = Path(__file__).parent.parent


def replay(*sizes_and_keys: tuple[int, str], **options: object) -> Replay:
    return replay_events(sizes_and_keys, **options)


def test_small_requests_share_a_segment() -> None:
    """1, 512 and 513 bytes take blocks of 512 + 512 + 1024 = 2048 bytes of one 2 MiB segment."""
    result = replay((1, "a"), (512, "b"), (513, "c"))
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (2048, 2 * MIB)


def test_the_small_pool_ends_at_1_mib() -> None:
    """1 MiB twice fills a 2 MiB segment; 512 bytes more would open the next. 1 MiB + 1 byte opens a 20 MiB segment."""
    assert replay((MIB, "a"), (MIB, "b")).peak_reserved_bytes == 2 * MIB
    assert replay((MIB, "a"), (MIB, "b"), (1, "c")).peak_reserved_bytes == 4 * MIB
    assert replay((MIB + 1, "a")).peak_reserved_bytes == 20 * MIB


def test_requests_under_10_mib_share_20_mib_segments() -> None:
    """9 MiB + 9 MiB leave 2 MiB of a 20 MiB segment, in which 2 MiB fit and 3 MiB do not."""
    assert replay((9 * MIB, "a"), (9 * MIB, "b"), (2 * MIB, "c")).peak_reserved_bytes == 20 * MIB
    assert replay((9 * MIB, "a"), (9 * MIB, "b"), (3 * MIB, "c")).peak_reserved_bytes == 40 * MIB


def test_larger_requests_are_rounded_up_to_2_mib() -> None:
    """10 MiB stay 10, 11 MiB become 12, 500.5 MiB become 502: together 524 MiB."""
    result = replay((10 * MIB, "a"), (11 * MIB, "b"), (500 * MIB + 512 * KIB, "c"))
    assert result.peak_reserved_bytes == (10 + 12 + 502) * MIB


def test_a_large_remainder_of_up_to_1_mib_is_not_split_off() -> None:
    """11 MiB in a segment of 12: 1 MiB is left, not more than 1 MiB, so that all 12 count as allocated. For 10.75 MiB
    it is 1.25 MiB, which is split off and not allocated."""
    assert replay((11 * MIB, "a")).peak_allocated_bytes == 12 * MIB
    assert replay((10 * MIB + 768 * KIB, "a")).peak_allocated_bytes == 10 * MIB + 768 * KIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    """Freed segments of 30 and 14 MiB. 12 MiB go into the one of 14 (2 MiB split off), so that 30 MiB still fit the
    other: 44 MiB in all. First fit would put 12 into 30 and need 30 more."""
    events = [(30 * MIB, "a"), (14 * MIB, "b"), (-30 * MIB, "a"), (-14 * MIB, "b"), (12 * MIB, "c"), (30 * MIB, "d")]
    assert replay(*events).peak_reserved_bytes == 44 * MIB


def test_freed_neighbours_become_one_block() -> None:
    """4 x 5 MiB fill a 20 MiB segment. The 2nd and 3rd, freed in either order, are one block of 10 MiB; the 1st and
    3rd are two of 5, and 10 MiB need a segment of their own."""
    blocks = [(5 * MIB, name) for name in "abcd"]
    for freed, expected_bytes in (("bc", 20 * MIB), ("cb", 20 * MIB), ("ac", 30 * MIB)):
        releases = [(-5 * MIB, name) for name in freed]
        assert replay(*blocks, *releases, (10 * MIB, "e")).peak_reserved_bytes == expected_bytes


def test_fragments_cause_an_oom_with_memory_to_spare() -> None:
    """Budget 40 MiB: two 20 MiB segments, each with 5 MiB in use at its end. 15 + 15 MiB are free, yet 16 MiB fit
    nowhere: the segments are in use and cannot go back, and a third one of 16 MiB would make 56."""
    events = [(15 * MIB // 2, "a"), (15 * MIB // 2, "b"), (5 * MIB, "c")]
    events += [(15 * MIB // 2, "d"), (15 * MIB // 2, "e"), (5 * MIB, "f")]
    events += [(-15 * MIB // 2, name) for name in "abde"]
    result = replay(*events, (16 * MIB, "g"), (MIB, "never"), budget_bytes=40 * MIB)
    assert result.oom is not None
    assert (result.oom.event_index, result.oom.requested_bytes) == (10, 16 * MIB)
    assert (result.oom.allocated_bytes, result.oom.reserved_bytes) == (10 * MIB, 40 * MIB)


def test_whole_cached_segments_are_given_back_before_an_oom() -> None:
    """Budget 50 MiB, a freed segment of 30 MiB: 40 MiB fit no block, but do after the 30 went back. Unbounded, both
    are reserved. With 2 MiB of a segment of 30 in use, nothing can go back, and 40 do not fit."""
    events = [(30 * MIB, "a"), (-30 * MIB, "a"), (40 * MIB, "b")]
    assert replay(*events, budget_bytes=50 * MIB) == Replay(40 * MIB, 40 * MIB)
    assert replay(*events).peak_reserved_bytes == 70 * MIB
    pinned = [(30 * MIB, "a"), (-30 * MIB, "a"), (2 * MIB, "pin"), (40 * MIB, "b")]
    assert replay(*pinned, budget_bytes=50 * MIB).oom is not None


def test_expandable_segments_grow_by_pages() -> None:
    """30 MiB map two pages of 20; 9 more fit into the 10 left; 11 more make 50: a third page. Without, 30 + 20 MiB are
    reserved, and the 11 fit beside the 9. Small requests map pages of 2 MiB of a segment of their own."""
    events = [(30 * MIB, "a"), (9 * MIB, "b"), (11 * MIB, "c")]
    assert replay(*events[:1], expandable_segments=True).peak_reserved_bytes == 40 * MIB
    assert replay(*events[:2], expandable_segments=True).peak_reserved_bytes == 40 * MIB
    assert replay(*events, expandable_segments=True).peak_reserved_bytes == 60 * MIB
    assert replay(*events).peak_reserved_bytes == (30 + 20) * MIB
    assert replay((1, "a"), (MIB, "b"), expandable_segments=True).peak_reserved_bytes == 2 * MIB


def test_expandable_segments_do_not_fragment() -> None:
    """20 MiB, freed, then 30: the freed pages are the start of the larger block, 40 MiB instead of 20 + 30."""
    events = [(20 * MIB, "a"), (-20 * MIB, "a"), (30 * MIB, "b")]
    assert replay(*events, expandable_segments=True).peak_reserved_bytes == 40 * MIB
    assert replay(*events).peak_reserved_bytes == 50 * MIB


def test_the_block_that_can_grow_is_kept_for_last() -> None:
    """9 and 6 MiB of a page of 20, the 9 freed. 5 MiB would fit the last 5 exactly, but those can grow; they go into
    the 9. Then 25 MiB need but one page beside the last 5: 40 MiB in all, not 60."""
    events = [(9 * MIB, "a"), (6 * MIB, "b"), (-9 * MIB, "a"), (5 * MIB, "c"), (25 * MIB, "d")]
    assert replay(*events, expandable_segments=True).peak_reserved_bytes == 40 * MIB


def test_expandable_segments_give_back_whole_pages() -> None:
    """Budget 82 MiB, 40 + 20 + 20 MiB in use, and the 40 freed. Small requests of 22 MiB do not fit beside 80 until
    the 40 have gone back, which leaves a hole. A page of 20 MiB fits into it, 62 + 20 = 82, and a second does not."""
    events = [(40 * MIB, "a"), (20 * MIB, "b"), (20 * MIB, "c"), (-40 * MIB, "a")]
    small = [(MIB, f"small {i}") for i in range(22)]
    result = replay(*events, *small, budget_bytes=82 * MIB, expandable_segments=True)
    assert (result.oom, result.peak_reserved_bytes) == (None, 82 * MIB)
    more = [(20 * MIB, "d"), (20 * MIB, "e")]
    result = replay(*events, *small, *more, budget_bytes=82 * MIB, expandable_segments=True)
    assert result.oom is not None and result.oom.event_index == len(events) + len(small) + 1


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_what_always_holds(expandable: bool, seed: int) -> None:
    """Any sequence: reserved >= allocated >= requested, reserved is whole 2 MiB; after everything is freed each pool's
    blocks are whole again, and the same sequence once more needs nothing new."""
    rng = random.Random(seed)
    allocator = CachingAllocator(expandable_segments=expandable)
    sizes = [int(2 ** rng.uniform(0, 26)) for _ in range(400)]
    live: list[tuple[int, object]] = []
    for nbytes in sizes:
        live.append((nbytes, allocator.malloc(nbytes)))
        if rng.random() < 0.4:
            allocator.free(live.pop(rng.randrange(len(live)))[1])
        assert sum(n for n, _ in live) <= allocator.allocated_bytes <= allocator.reserved_bytes
        assert allocator.reserved_bytes % (2 * MIB) == 0
    for _, block in live:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    free_bytes = sum(nbytes for pool in allocator.pools.values() for nbytes, _ in pool.free)
    assert free_bytes == allocator.reserved_bytes == allocator.peak_reserved_bytes
    allocator.release_cached()
    assert allocator.reserved_bytes == 0


def test_a_second_round_needs_no_new_segment() -> None:
    """A training step's allocations, all freed, and the step again: the peak does not move."""
    rng = random.Random(0)
    sizes = [int(2 ** rng.uniform(8, 26)) for _ in range(200)]
    step = [(nbytes, i) for i, nbytes in enumerate(sizes)] + [(-nbytes, i) for i, nbytes in enumerate(sizes)]
    assert replay(*step, *step).peak_reserved_bytes == replay(*step).peak_reserved_bytes


def test_speed() -> None:
    """200,000 events, at most 10 s even on a busy machine (it takes a third of a second)."""
    rng = random.Random(0)
    events, live = [], []
    for key in range(100_000):
        nbytes = int(2 ** rng.uniform(2, 25))
        events.append((nbytes, key))
        live.append((nbytes, key))
        if len(live) > 500:
            nbytes, key = live.pop(rng.randrange(len(live)))
            events.append((-nbytes, key))
    start = time.monotonic()
    replay_events(events)
    assert time.monotonic() - start < 10


def test_streams_do_not_share_segments() -> None:
    """12 MiB released on one stream serve the same stream again, and not another one: 12, then 24 MiB."""
    events = [(12 * MIB, "a", 1), (-12 * MIB, "a", 1), (12 * MIB, "b", 1), (-12 * MIB, "b", 1)]
    assert replay_events(events).peak_reserved_bytes == 12 * MIB
    assert replay_events([*events, (12 * MIB, "c", 2)]).peak_reserved_bytes == 24 * MIB
    expandable = replay_events([*events, (12 * MIB, "c", 2)], expandable_segments=True)
    assert expandable.peak_reserved_bytes == 40 * MIB  # two ranges of 20 MiB pages


def test_a_recorded_history() -> None:
    """What an H100's allocator reserved while MGM-2B was loaded, moved and trained, at each of 67,352 events, to the
    byte. Memory was given back when the model left the GPU for a moment: there the cache is released here too."""
    history = json.loads(gzip.decompress((ROOT / "results/gpu/history.json.gz").read_bytes()))
    allocator, blocks, reserved_bytes, previous = CachingAllocator(expandable_segments=True), {}, 0, ""
    for action, address, nbytes in history["events"]:
        if action == "alloc":
            blocks[address] = allocator.malloc(nbytes)
        elif action == "free_completed":
            allocator.free(blocks.pop(address))
        elif action == "segment_unmap" and previous != "segment_unmap":
            allocator.release_cached()
        reserved_bytes += {"segment_map": nbytes, "segment_unmap": -nbytes}.get(action, 0)
        if action in ("alloc", "free_completed"):
            assert allocator.reserved_bytes == reserved_bytes
        previous = action
    assert allocator.peak_reserved_bytes == history["measured"]["peak_reserved_bytes"]
