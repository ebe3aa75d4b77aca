"""A record for each memory: the device's, and the host's, pinned and ordinary."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memory.record import Allocation, Record
from memory.recorder import Recorder, Workspace
from memory.stand_in import HOST


@dataclass
class PlacedRecord:
    """The device's memory, and the host's: pinned and ordinary. A CPU run has all of it in `device`."""

    device: Record
    pinned: Record
    host: Record


class PlacedRecorder(Recorder):
    """A recorder that also notes in which memory each allocation lies."""

    def __init__(self, model: nn.Module, device: str, workspaces: dict[str, Workspace], block_bytes: int) -> None:
        super().__init__(model, workspaces, block_bytes)
        self.device = torch.device(device)
        self.places: dict[Allocation, str] = {}
        self.category: str | None = None  # of what is allocated now, where that is known

    def allocated(self, tensor: torch.Tensor, op: str) -> Allocation:
        allocation = super().allocated(tensor, op)
        if allocation not in self.places:
            self.places[allocation] = self._place(tensor, op)
            allocation.category = self.category
        return allocation

    def _place(self, tensor: torch.Tensor, op: str) -> str:
        if tensor.device.type == "meta":
            return "nowhere"  # DeepSpeed notes shapes as such
        if self.device == torch.device(HOST):
            return "device"  # a CPU run has one memory
        if isinstance(tensor, FakeTensor):
            return "device" if tensor.device == self.device else "host"
        # Real tensors lie on the CPU. The batch's stand for the device's, and so does what the model makes of them.
        return "device" if op == "load" or self.phase == "evaluate" or self.is_in_model() else "host"

    def in_host_memory(self, tensor: torch.Tensor) -> bool:
        is_apart = self.device != torch.device(HOST)
        return is_apart and isinstance(tensor, FakeTensor) and tensor.fake_device == torch.device(HOST)

    def on_stream(self, stream: int) -> AbstractContextManager:
        return patch.object(self, "stream", stream)

    def of_category(self, category: str) -> AbstractContextManager:
        """A context in which everything that is allocated has this category."""
        return patch.object(self, "category", category)

    def note_pinned(self, tensor: torch.Tensor) -> None:
        self.places[self.find(tensor)] = "pinned"


def split_by_place(
    recorder: PlacedRecorder, num_events_before_steps: int, is_split: bool = True, splits_on_device: bool = False
) -> PlacedRecord:
    """A record for each memory.

    The record of ordinary host memory begins when the engine has been built. So does the device's if the weights are
    split. `splits_on_device`: before that, ZeRO-3 has read and split them there, parameter by parameter.
    """

    def record_of(place: str, first: int = 0, before: Record | None = None) -> Record:
        return _select(recorder.record, lambda a: recorder.places.get(a, "device") == place, first, before)

    is_apart = recorder.device != torch.device(HOST)  # a CPU run has one memory, and its loading is not recorded
    placed = PlacedRecord(
        device=record_of(
            "device",
            num_events_before_steps if is_split else 0,
            splitting(recorder) if splits_on_device and is_apart else None,
        ),
        pinned=record_of("pinned"),
        host=record_of("host", num_events_before_steps),
    )
    placed.device.notes, placed.device.work = recorder.record.notes, recorder.work.micro_batches
    return placed


def splitting(recorder: PlacedRecorder) -> Record:
    """ZeRO-3 makes each weight on the device, and a copy of it, before it splits it."""
    record = Record(phase_starts=[(0, "load")])
    for nbytes, weight in recorder.record.events:
        if nbytes > 0 and weight.op == "load" and weight.category in ("weights", "trained"):
            pair = []
            for what in ("split", "a copy to split"):
                pair.append(replace(weight, start=len(record.events), op=what, category="weights"))
                record.events.append((nbytes, pair[-1]))
            for allocation in pair:
                allocation.end = len(record.events)
                record.events.append((-nbytes, allocation))
    return record


def _select(record: Record, is_wanted: Callable[[Allocation], bool], first: int, before: Record | None) -> Record:
    """The events of some allocations, after those of `before`. Of what was allocated before the event `first` only
    what is still alive then is kept, without its temporaries."""
    selected, copies = before or Record(), {}
    phase_starts = dict(record.phase_starts)
    for index, (nbytes, allocation) in enumerate(record.events):
        if index in phase_starts and phase_starts[index] not in [phase for _, phase in selected.phase_starts[-1:]]:
            selected.phase_starts.append((len(selected.events), phase_starts[index]))
        was_freed = allocation.end is not None and allocation.end < first
        if was_freed or not is_wanted(allocation):
            continue
        if index == allocation.start:
            copies[allocation] = replace(allocation, start=len(selected.events), end=None)
        else:
            copies[allocation].end = len(selected.events)
        selected.events.append((nbytes, copies[allocation]))
    return selected
