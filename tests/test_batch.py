"""A Batch on its way from the loader to the model: torch pins it and accelerate moves it, as they are installed."""

from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from data.batch import Batch, UnusableSample
from data.batching import BatchCollator, MicroBatch
from data.dataset import PROBLEM
from data.skipping import CheckedCollator, CheckedUpdates


BAD = UnusableSample(index=3, problem="no image", num_label_tokens=5)


def make_batch() -> Batch:
    return Batch({"input_ids": torch.ones(1, 2), "labels": torch.zeros(1, 2)}, ["a"], [BAD], [BAD, BAD])


def test_accelerate_moves_it() -> None:
    """All tensors, to the device that is asked for; ids and bad samples come along."""
    moved = send_to_device(make_batch(), torch.device("meta"))
    assert isinstance(moved, Batch) and {tensor.device.type for tensor in moved.inputs.values()} == {"meta"}
    assert moved.inputs.keys() == {"input_ids", "labels"}
    assert (moved.sample_ids, moved.bad, moved.bad_in_update) == (["a"], [BAD], [BAD, BAD])


@pytest.mark.parametrize("non_blocking", [False, True])
def test_non_blocking_is_passed_on(non_blocking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From accelerate's loader to every tensor: else the GPU would be waited for at each."""
    move, asked = torch.Tensor.to, []

    def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["non_blocking"])
        return move(tensor, *args, **kwargs)

    loader = DataLoader([make_batch()] * 2, batch_size=None)
    loader = prepare_data_loader(loader, torch.device("cpu"), put_on_device=True, non_blocking=non_blocking)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    assert all(isinstance(batch, Batch) for batch in loader)
    assert asked == [non_blocking] * 4


def test_torch_pins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors. (Without a GPU nothing can be pinned for real.)"""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 7)
    pinned = pin_memory(make_batch())
    assert isinstance(pinned, Batch) and pinned.inputs["input_ids"].tolist() == [[8, 8]]
    assert pinned.inputs["labels"].tolist() == [[7, 7]] and pinned.bad_in_update == [BAD, BAD]


@pytest.mark.gpu
def test_pinned_and_moved_for_real() -> None:
    loader = DataLoader([make_batch()] * 2, batch_size=None, num_workers=1, pin_memory=True)
    assert all(tensor.is_pinned() for batch in loader for tensor in batch.inputs.values())
    loader = prepare_data_loader(loader, torch.device("cuda"), put_on_device=True, non_blocking=True)
    assert all(tensor.is_cuda for batch in loader for tensor in batch.inputs.values())


class Samples(torch.utils.data.Dataset):
    """Every third is bad. A row is of two."""

    def __init__(self, is_packed: bool) -> None:
        self.is_packed = is_packed

    def __getitem__(self, index: int) -> dict | list[dict]:
        if self.is_packed:
            return [Samples(False)[2 * index], Samples(False)[2 * index + 1]]
        problem = {PROBLEM: "no image", "index": index, "num_label_tokens": 10 + index} if index % 3 == 0 else {}
        return {"id": str(index)} | problem

    def __len__(self) -> int:
        return 12


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_packed", [False, True])
def test_bad_samples_reach_the_batch(is_packed: bool, num_workers: int) -> None:
    """Those of the micro-batch, and at the update's first one those of all: also through a worker."""
    micro_batches = [MicroBatch([0, 1], [3, 4]), MicroBatch([3, 4], None)]
    collator = CheckedCollator(BatchCollator(lambda samples: {"x": torch.ones(len(samples))}))
    checked = CheckedUpdates(Samples(is_packed))
    loader = DataLoader(checked, batch_sampler=micro_batches, collate_fn=collator, num_workers=num_workers)
    first, second = loader
    assert first.sample_ids == (["0", "1", "2", "3"] if is_packed else ["0", "1"]) and first.inputs["x"].shape == (2,)
    here, elsewhere = ([0, 3], [6, 9]) if is_packed else ([0], [3])
    assert first.bad == [UnusableSample(index, "no image", 10 + index) for index in here]
    assert first.bad_in_update == first.bad + second.bad
    assert [sample.index for sample in second.bad] == elsewhere and second.bad_in_update is None


def test_a_filler_has_no_id() -> None:
    """It stands for a sample that a process lacks, and no message may name it."""
    batch = BatchCollator(lambda samples: {"x": torch.ones(1)})([{"id": "a"}, {"conversations": []}])
    assert batch == Batch(batch.inputs, ["a"], num_samples=2)
