"""The memory snapshot: the record's numbers in it, torch's own tools on it, and a file that the viewer can read."""

import pickletools
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_records import tiny_config, traced
from torch.cuda import _memory_viz as tools

from memory.categories import TITLES
from memory.predict import device_memory
from memory.record import Allocation, Record
from memory.snapshot import snapshot, snapshot_bytes
from utils import MIB


SIGNS = {"alloc": 1, "segment_alloc": 1, "segment_map": 1}
SIGNS |= {"free_completed": -1, "segment_free": -1, "segment_unmap": -1}
# What torch/utils/viz/MemoryViz.js reads of the pickle format.
OPCODES = (
    "PROTO FRAME MEMOIZE BINGET LONG_BINGET BINPUT LONG_BINPUT STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE DICT LIST "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "BINFLOAT BINUNICODE SHORT_BINUNICODE"
)


@pytest.fixture(params=["expandable_segments:True", "expandable_segments:False"])
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", request.param)


@pytest.fixture(params=["single", pytest.param("zero3", marks=pytest.mark.slow)])
def record(request: pytest.FixtureRequest) -> Record:
    return traced(request.param).device


def in_use(taken: dict[str, Any], kind: str) -> Iterator[int]:
    """The bytes of blocks, or of segments, after each entry of the trace."""
    total = 0
    for entry in taken["device_traces"][0]:
        if entry["action"] in SIGNS and entry["action"].startswith("segment") == (kind == "segment"):
            total += SIGNS[entry["action"]] * entry["size"]
        yield total


def test_peaks_are_those_of_the_prediction(record, settings):
    """What is allocated, as the record has it; what is reserved, as the replay has it."""
    taken = snapshot(record)
    assert max(in_use(taken, "block")) == record.peak_bytes
    assert max(in_use(taken, "segment")) == device_memory(record, tiny_config())["peak_reserved_bytes"]


def test_segments_are_those_at_the_end(record, settings):
    """As large as what the trace leaves, made of their blocks, and in use is what the record leaves."""
    taken = snapshot(record)
    segments = taken["segments"]
    assert sum(segment["total_size"] for segment in segments) == list(in_use(taken, "segment"))[-1] > 0
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
    blocks = [block for segment in segments for block in segment["blocks"] if block["state"] == "active_allocated"]
    assert sum(block["requested_size"] for block in blocks) == record.timeline()[-1] > 0
    assert all(segment["allocated_size"] <= segment["total_size"] for segment in segments)


def test_nothing_lies_on_anything_else(record, settings):
    """After every entry: each block lies where memory is, and where no other block lies."""
    page, reserved, used = 512, set(), set()
    for entry in snapshot(record)["device_traces"][0]:
        pages = set(range(entry["addr"] // page, -(-(entry["addr"] + entry["size"]) // page)))
        if entry["action"] in ("segment_alloc", "segment_map"):
            assert not pages & reserved
            reserved |= pages
        elif entry["action"] in ("segment_free", "segment_unmap"):
            assert pages <= reserved and not pages & used
            reserved -= pages
        elif entry["action"] == "alloc":
            assert pages <= reserved and not pages & used
            used |= pages
        elif entry["action"] == "free_completed":
            assert pages <= used
            used -= pages


def test_torchs_tools_read_it(record, settings):
    """The plots' pages, the sums and the lists; a flame graph has what made the tensors that are left. The pages fetch
    their script from the network: here they are made and not drawn."""
    taken = snapshot(record)
    assert "snapshot.pickle" in tools.trace_plot(taken) and "snapshot.pickle" in tools.segment_plot(taken)
    assert f"segments: {len(taken['segments'])}\n" in tools.segsum(taken)
    num_entries = len(taken["device_traces"][0])
    assert f"{num_entries} entries" in tools.trace(taken)
    lines = tools.memory(taken, format_flamegraph=str)
    left = [allocation for allocation in record.alive_at(len(record.events) - 1) if allocation.nbytes]
    for allocation in left:
        assert f"active_allocated;{TITLES[allocation.category]}:0:{allocation.phase};" in lines
        assert f":0:{allocation.op} {list(allocation.shape)} {allocation.dtype} {allocation.nbytes}\n" in lines
    assert tools.segments(taken, format_flamegraph=str)
    assert tools.compare([], taken["segments"], format_flamegraph=str).startswith("only_after;")


def test_a_tensor_has_its_operator_module_phase_and_category():
    """By hand: 4 x 8 numbers of a layer's product, made in the forward pass."""
    made = Allocation(64, (4, 8), "bfloat16", "aten.mm.default", "base_model.model.layers.0.mlp", "forward", 0)
    made.category = "activations"
    (segment, entry) = snapshot(Record([(64, made)], [(0, "forward")]))["device_traces"][0]
    assert (segment["action"], entry["action"], entry["size"]) == ("segment_map", "alloc", 64)
    assert entry["category"] == "activations" and segment["category"] == "unknown"
    assert tools._frames_fmt(entry["frames"]) == [
        "layers.0.mlp:0:aten.mm.default [4, 8] bfloat16",
        "activations:0:forward",
    ]


def test_the_cache_is_given_back_before_the_first_step(monkeypatch):
    """By hand: loading takes segments of 30 and 14 MiB and leaves nothing in them; the step takes one of 20 MiB."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    loaded = [
        Allocation(size * MIB, (), "", "load", "", "load", i, "weights", 3 - i) for i, size in enumerate((30, 14))
    ]
    kept = Allocation(5 * MIB, (), "", "aten.mm.default", "", "forward", 4, "activations")
    events = [(a.nbytes, a) for a in loaded] + [(-a.nbytes, a) for a in reversed(loaded)] + [(kept.nbytes, kept)]
    taken = snapshot(Record(events, [(0, "load"), (4, "forward")]))
    trace = [(entry["action"], entry["size"] // MIB) for entry in taken["device_traces"][0]]
    freed = [(action, size) for size in (14, 30) for action in ("free_requested", "free_completed")]
    assert trace[:8] == [("segment_alloc", 30), ("alloc", 30), ("segment_alloc", 14), ("alloc", 14), *freed]
    assert sorted(trace[8:10]) == [("segment_free", 14), ("segment_free", 30)]
    assert trace[10:] == [("segment_alloc", 20), ("alloc", 5)]
    assert [segment["total_size"] // MIB for segment in taken["segments"]] == [20]


def test_the_viewer_reads_the_file(record):
    """It has a reader of its own, for protocol 4 at most and no other operations than these."""
    operations = list(pickletools.genops(snapshot_bytes(record)))
    assert operations[0][0].name == "PROTO" and operations[0][1] <= 4
    assert {operation.name for operation, *_ in operations} <= set(OPCODES.split())
