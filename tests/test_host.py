"""Host memory: pinned blocks by hand, and what processes and workers add."""

import pytest
from tiny_records import traced

from memory.host import host_breakdown, pinned_blocks_bytes
from memory.record import Allocation, Record
from utils import MIB


def record_of(*sizes: int) -> Record:
    """A record from bytes: positive ones allocate, negative ones release the last allocation of that size."""
    record, live = Record(), {}
    for nbytes in sizes:
        if nbytes > 0:
            live[nbytes] = Allocation(nbytes, (nbytes,), "uint8", "", "", "load", len(record.events))
        record.events.append((nbytes, live[abs(nbytes)]))
        if nbytes < 0:
            live[-nbytes].end = len(record.events) - 1
    return record


def test_pinned_blocks_by_hand() -> None:
    """3 -> 4 MiB, 5 -> 8 MiB, the released 4 MiB block serves the 4 MiB, 2 -> 2 MiB: 14 MiB, of which 11 are used."""
    record = record_of(3 * MIB, 5 * MIB, -3 * MIB, 4 * MIB, 2 * MIB)
    assert pinned_blocks_bytes(record) == 14 * MIB
    assert pinned_blocks_bytes(record_of(MIB + 1)) == 2 * MIB
    assert pinned_blocks_bytes(Record()) == 0


@pytest.mark.slow
def test_host_breakdown_counts_processes_and_workers() -> None:
    """Twice the processes, twice all; a worker more costs its memory and its batches; all parts are positive."""
    record = traced("zero3", "param")
    one = host_breakdown(record, num_workers=1)
    assert host_breakdown(record, num_workers=1, world_size=2) == {key: 2 * nbytes for key, nbytes in one.items()}
    assert min(one.values()) > 0 and {"weights", "optimizer", "workers", "batches", "process"} <= one.keys()
    more = host_breakdown(record, num_workers=3)
    assert {key for key in one if more[key] != one[key]} == {"workers", "batches"}
    assert sum(one.values()) >= pinned_blocks_bytes(record.pinned) + record.host.peak_bytes
