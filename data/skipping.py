"""Leaving bad samples out of an update whose loss stays a mean over the label tokens that are really seen.

The number of those tokens has to be known before the update's first backward pass, on every process. So the worker
that makes a process's first micro-batch of an update also opens the images of its others, and tells which are bad.
Images are decoded twice by that. A bad sample keeps its place, without image, reply and label tokens.
"""

from collections.abc import Callable
from typing import Any

import torch

from data.batching import MicroBatch, flat
from data.dataset import PROBLEM


Bad = list[dict[str, Any]]  # `index`, `problem` and `num_label_tokens` of each


class CheckedUpdates(torch.utils.data.Dataset):
    """A data set whose bad samples have a `problem`, read micro-batch by micro-batch for a CheckedCollator."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, micro_batch: MicroBatch) -> tuple[list[Any], Bad, Bad | None]:
        """The samples, the bad ones among them, and at an update's beginning all bad ones of this process."""
        samples = [self.dataset[index] for index in micro_batch]
        here = find_bad(samples)
        if micro_batch.others is None:
            return samples, here, None
        return samples, here, here + [bad for index in micro_batch.others for bad in find_bad([self.dataset[index]])]


class CheckedCollator:
    """What `collator` makes of the samples, and both lists of CheckedUpdates: `bad_here` and `bad_in_update`."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, checked: tuple[list[Any], Bad, Bad | None]) -> dict[str, Any]:
        samples, here, in_update = checked
        return {**self.collator(samples), "bad_here": here, "bad_in_update": in_update}


def find_bad(samples: list[Any]) -> Bad:
    keys = ("index", PROBLEM, "num_label_tokens")
    return [{key: sample[key] for key in keys} for sample in flat(samples) if PROBLEM in sample]
