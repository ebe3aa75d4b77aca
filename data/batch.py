"""What a loader yields: a micro-batch, the ids of its samples, and which of them are bad."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class UnusableSample:
    """A bad sample. It keeps its place in the batch, without images, reply and labels."""

    index: int  # in the data set
    problem: str
    num_label_tokens: int  # that its update loses


@dataclass
class Batch:
    """A micro-batch.

    accelerate moves it to the device with `to`, and a DataLoader pins it with `pin_memory`: both look for a method of
    that name.
    """

    inputs: dict[str, torch.Tensor]  # forward's arguments
    sample_ids: list[str]
    bad: list[UnusableSample] | None = None  # of this micro-batch; None: nobody has looked for them
    bad_in_update: list[UnusableSample] | None = None  # at an update's start: of all its micro-batches on this process
    num_samples: int = 0
    num_tokens: int = 0  # without padding

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()}
        return replace(self, inputs=moved)

    def pin_memory(self) -> "Batch":
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})
