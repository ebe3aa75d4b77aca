"""DDP's buckets by hand, and against torch's own."""

import torch
from tiny_records import parameter_bytes, traced

from memory.ddp import (
    BROADCAST_BYTES,
    DDP_BUCKET_BYTES,
    broadcast,
    broadcast_sizes,
    ddp_bucket_sizes,
    with_ddp,
    with_reduction,
)
from memory.work import Operation
from utils import MIB


DTYPES = (torch.bfloat16, torch.float32)


def test_ddp_buckets_by_hand() -> None:
    """From the last parameter on: 0.75 + 0.5 MiB pass 1 MiB, 10 + 16 MiB pass 25 MiB, what is left is the last one."""
    sizes = [nbytes * MIB // 4 for nbytes in (4, 64, 40, 2, 3)]
    assert ddp_bucket_sizes(sizes) == [5 * MIB // 4, 26 * MIB, MIB]
    assert ddp_bucket_sizes([]) == []


def test_ddp_buckets_are_torchs() -> None:
    """torch assigns parameters to buckets in the order it is given; DDP reverses its result."""
    parameters = [torch.empty(size) for size in (300_000, 7_000_000, 1, 200_000, 9_000_000, 400_000, 10_000)]
    limits = [MIB, DDP_BUCKET_BYTES]
    indices, _ = torch.distributed._compute_bucket_assignment_by_size(parameters[::-1], limits)
    expected = [sum(parameters[::-1][i].nbytes for i in bucket) for bucket in indices]
    assert ddp_bucket_sizes([parameter.nbytes for parameter in parameters]) == expected


def test_what_sends_the_weights_by_hand() -> None:
    """Each dtype fills pieces of its own, up to 250 MiB and one tensor more; one tensor alone needs no copy."""
    sizes = [("bfloat16", 200), ("float32", 10), ("bfloat16", 100), ("bfloat16", 300), ("float32", 20)]
    assert broadcast_sizes((dtype, nbytes * MIB) for dtype, nbytes in sizes) == [300 * MIB, 30 * MIB, 0]
    pieces = [("bfloat16", nbytes * MIB) for nbytes in (1, 249, 2, 248, 3, 247, 4, 5)]
    events = broadcast(pieces, 7)
    assert [nbytes // MIB for nbytes, _ in events] == [250, 250, -250, 250, -250, 9, -250, -9]
    assert all(events[(a.start if nbytes > 0 else a.end) - 7] == (nbytes, a) for nbytes, a in events)


def test_what_sends_the_weights_is_torchs() -> None:
    """The same pieces as torch's own, of the tensors in their order."""
    tensors = [
        torch.empty(size, dtype=dtype, device="meta") for size in (2**26, 2**20, 2**25, 2**28) for dtype in DTYPES
    ]
    indices, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, [BROADCAST_BYTES])
    expected = [sum(tensors[i].nbytes for i in piece) if len(piece) > 1 else 0 for piece in sorted(indices)]
    assert broadcast_sizes((str(tensor.dtype), tensor.nbytes) for tensor in tensors) == expected


def test_ddp_adds_the_trained_parameters_once_more() -> None:
    """Every gradient is there by itself and in a bucket; the rest is a single process's."""
    single, ddp = traced("single").device, traced("ddp").device
    assert ddp.peak_bytes - single.peak_bytes == parameter_bytes()[True]
    assert ddp.breakdown()["communication"] == parameter_bytes()[True]
    for nbytes, allocation in ddp.events:
        at = allocation.start if nbytes > 0 else allocation.end
        assert nbytes == 0 or ddp.events[at] == (nbytes, allocation)


def test_ddp_sums_gradients_before_they_are_clipped() -> None:
    """Of two processes each sends as many bytes as its gradients have; one alone sends none."""
    first, last = (Operation("kernel", "mm", phase, True) for phase in ("backward", "step"))
    assert with_reduction([[first, last]], 100, 1) == [[first, last]]
    (found,) = with_reduction([[first, last]], 100, 2)
    assert [each.kind for each in found] == ["kernel", "transfer", "kernel"]
    assert found[1].nbytes == 100


def test_ddp_leaves_the_given_record_alone() -> None:
    record = traced("single").device
    before = [(nbytes, a.start, a.end) for nbytes, a in record.events]
    with_ddp(record, 2)
    assert [(nbytes, a.start, a.end) for nbytes, a in record.events] == before
