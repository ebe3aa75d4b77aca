"""Leave bad samples out of an update, and keep its loss a mean over the label tokens that are left.

That number must be known before the update's first backward pass, on every process. So the worker that makes a
process's first micro-batch of an update also opens the images of its other micro-batches, to find the bad ones. Those
images are decoded twice. A bad sample keeps its place, without images, reply and labels.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from data.batch import Batch, UnusableSample
from data.batching import MicroBatch, Sample, flatten
from data.dataset import PROBLEM


Checked = tuple[list[Sample], list[UnusableSample], list[UnusableSample] | None]


class CheckedUpdates(torch.utils.data.Dataset):
    """A data set read a micro-batch at a time: its samples, then Batch's `bad` and `bad_in_update`."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, micro_batch: MicroBatch) -> Checked:
        samples = [self.dataset[index] for index in micro_batch]
        bad = find_bad(samples)
        if micro_batch.others is None:
            return samples, bad, None
        # Sample by sample: the images of a whole update need not fit into memory.
        return samples, bad, bad + [each for index in micro_batch.others for each in find_bad([self.dataset[index]])]


class CheckedCollator:
    """What CheckedUpdates has read to a Batch. `collator` makes it of the samples."""

    def __init__(self, collator: Callable[[list[Sample]], Batch]) -> None:
        self.collator = collator

    def __call__(self, checked: Checked) -> Batch:
        samples, bad, bad_in_update = checked
        return replace(self.collator(samples), bad=bad, bad_in_update=bad_in_update)


def find_bad(samples: list[Sample]) -> list[UnusableSample]:
    return [
        UnusableSample(sample["index"], sample[PROBLEM], sample["num_label_tokens"])
        for sample in flatten(samples)
        if PROBLEM in sample
    ]
