"""From conversations to batches: the samples of each update, and their collation."""

import ctypes
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from chat.arguments import find_positions
from chat.encoding import encode
from chat.images import shrink
from chat.messages import messages_for
from data.batch import Batch
from data.dataset import FILLER
from data.dummy_image import with_dummy_image
from data.sharing import share


MEGA_BATCH = 50  # updates that are sorted together, as in transformers
Sample = dict[str, Any] | list[dict[str, Any]]  # of a ConversationDataset; packed: a row of them


class MicroBatch(list):
    """Sample indices of one micro-batch. The first of an update also carries `others`: the indices of this process's
    other micro-batches in that update."""

    def __init__(self, samples: list[int], others: list[int] | None) -> None:
        super().__init__(samples)
        self.others = others

    def __reduce__(self) -> tuple:  # list's own would lose `others` on the way to a worker
        return MicroBatch, (list(self), self.others)


class UpdateBatchSampler:
    """Micro-batches in the order of training: update by update, step by step, process by process.

    An update has the same samples however they are divided among micro-batches and processes: micro-batches of 1 x 8
    accumulation steps, 4 x 2, and 4 on 2 processes train alike. accelerate gives the micro-batches to the processes in
    turn. If an epoch's last samples are too few for all processes, some get a FILLER, so that all take part.

    Args:
        num_tokens: if given, an update's samples are sorted by length, longest first, before they are cut into
            micro-batches. That saves padding. The update's loss stays the same: it is a mean over its label tokens.
        group_by_length: samples of similar length share an update, as in transformers' LengthGroupedSampler. The
            first update has the longest sample, so that memory runs out at once or never.
    """

    # accelerate reads both. An epoch's last update may have smaller micro-batches, which it must not pad.
    batch_size = None
    drop_last = False

    def __init__(
        self,
        num_label_tokens: np.ndarray,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        num_processes: int,
        seed: int,
        num_tokens: np.ndarray | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.num_label_tokens = num_label_tokens
        self.micro_batch_size = micro_batch_size
        self.update_size = micro_batch_size * gradient_accumulation_steps * num_processes
        # In an epoch's order, where each update begins. Only the last may have fewer samples than the others.
        self.starts = range(0, len(num_label_tokens), self.update_size)
        self.num_processes = num_processes
        self.seed = seed
        self.num_tokens = num_tokens
        self.group_by_length = group_by_length
        self.epoch = 0
        self.first_update = 0  # in this epoch; those before it are done

    def start_at(self, epoch: int, update: int = 0) -> None:
        """Continue an epoch after its first `update` updates. Their samples are not opened.

        It is not called `set_epoch`: accelerate calls that with its own count, which starts at 0 in a resumed run.
        """
        self.epoch, self.first_update = epoch, update

    def digest(self) -> str:
        """A hash of all samples' lengths. It changes with the tokenizer and the chat template."""
        columns = [self.num_label_tokens] if self.num_tokens is None else [self.num_label_tokens, self.num_tokens]
        return hashlib.sha256(b"".join(np.asarray(column, np.int64).tobytes() for column in columns)).hexdigest()[:16]

    def order(self) -> np.ndarray:
        """The indices of the epoch's samples, shuffled by seed and epoch, update after update."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.num_label_tokens))
        if self.group_by_length:
            order = self._grouped(order, generator)
        return order if self.num_tokens is None else self._sorted_in_blocks(order, self.update_size)

    def updates(self) -> list[np.ndarray]:
        """The indices of the epoch's samples, an array for each update."""
        return np.split(self.order(), self.starts[1:])

    def label_tokens_per_update(self) -> list[int]:
        """The number of label tokens of each update, all processes together. Its loss is the mean over them."""
        return np.add.reduceat(self.num_label_tokens[self.order()], self.starts).astype(int).tolist()

    def num_updates(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[MicroBatch]:
        for update in self.updates()[self.first_update :]:
            parts = [part.tolist() for part in np.array_split(update, self._num_micro_batches(len(update)))]
            for i, part in enumerate(parts):
                is_first = i < self.num_processes
                others = sum(parts[i + self.num_processes :: self.num_processes], []) if is_first else None
                yield MicroBatch(part or [FILLER], others)

    def __len__(self) -> int:
        sizes = np.diff(self.starts, append=len(self.num_label_tokens)).tolist()
        return sum(map(self._num_micro_batches, sizes[self.first_update :]))

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Sort mega-batches by length, cut them into updates and shuffle the updates. A short last update stays last.
        The longest sample is put into the first update."""
        longest = self.num_tokens[order].argmax()
        order[[0, longest]] = order[[longest, 0]]
        num_full = len(order) // self.update_size
        mega_batch = max(1, min(num_full // 4, MEGA_BATCH)) * self.update_size  # a small data set must be mixed too
        order = self._sorted_in_blocks(order, mega_batch)
        full, rest = np.split(order, [num_full * self.update_size])
        full = full.reshape(num_full, self.update_size)
        generator.shuffle(full[1:])
        return np.concatenate([full.flatten(), rest])

    def _sorted_in_blocks(self, order: np.ndarray, block_size: int) -> np.ndarray:
        """Sort each block of `block_size` samples by length, longest first. Equally long samples keep their order."""
        return order[np.lexsort((-self.num_tokens[order], np.arange(len(order)) // block_size))]

    def _num_micro_batches(self, num_samples: int) -> int:
        steps = -(-num_samples // (self.micro_batch_size * self.num_processes))
        return steps * self.num_processes


def return_freed_memory() -> None:
    """Return the memory of freed images to the system.

    glibc's heap keeps up to hundreds of megabytes of it in gaps. `malloc_trim` at every batch costs little. Keeping
    large buffers out of the heap (`mallopt`) doubles the time per image. Other C libraries need neither.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class TrainCollator:
    """Samples of a ConversationDataset to forward's arguments. Runs in the loader's workers.

    Args:
        max_image_pixels: larger images are shrunk to so many; 0: none is.
        dummy_images: put one into a batch that has none.
    """

    def __init__(
        self, processor: ProcessorMixin, max_length: int, max_image_pixels: int = 0, dummy_images: bool = False
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.dummy_images = dummy_images

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return_freed_memory()  # of the batch before
        batch = encode(
            self.processor,
            [messages_for(self.processor, sample["conversations"]) for sample in samples],
            [[shrink(image, self.max_image_pixels) for image in sample["images"]] for sample in samples],
            self.max_length,
        )
        if self.dummy_images and not any(sample["images"] for sample in samples):
            batch = with_dummy_image(self.processor, dict(batch))
        return {**batch, **find_positions(self.processor, batch)}


class BatchCollator:
    """Samples to a Batch, in shared memory if this is a worker.

    Args:
        collator: makes forward's arguments of samples.
        keeps_mask: whether the model needs `attention_mask`. With one, attention takes twice the time of a causal one.
    """

    def __init__(self, collator: Callable[[list[Sample]], dict[str, torch.Tensor]], keeps_mask: bool = True) -> None:
        self.collator = collator
        self.keeps_mask = keeps_mask

    def __call__(self, samples: list[Sample]) -> Batch:
        arguments, samples = self.collator(samples), list(flatten(samples))
        num_tokens = count_tokens(arguments)
        if not self.keeps_mask and is_padded_behind(arguments.get("attention_mask")):
            del arguments["attention_mask"]
        ids = [sample["id"] for sample in samples if "id" in sample]
        return Batch(share(arguments), ids, num_samples=len(samples), num_tokens=num_tokens)


def count_tokens(arguments: dict[str, torch.Tensor]) -> int:
    """Without padding. Packed samples have no mask, but each has a second token, and padding has position 0."""
    if "attention_mask" in arguments:
        return int(arguments["attention_mask"].sum())
    positions = arguments.get("position_ids")
    return 0 if positions is None else int((positions > 0).sum() + (positions == 1).sum())


def is_padded_behind(mask: torch.Tensor | None) -> bool:
    """Whether all padding of a mask [B, T] comes after a row's tokens."""
    return mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all())


def flatten(samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """The samples one after the other, also those that share a row."""
    for sample in samples:
        yield from sample if isinstance(sample, list) else [sample]
