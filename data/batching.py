"""From conversations to batches: the length of each sample, the samples of each update, and their collation."""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from tokenizers import Encoding

from data.batch import Batch
from data.cache import naming_the_cache
from data.dataset import FILLER
from data.sharing import share
from layers.chunked_loss import find_label_positions
from mgm.chat_templates import Span
from mgm.label_mask import CutImage, count_fitting_tokens, find_label_tokens
from mgm.processing_mgm import MGMProcessor
from utils import UserError, brief_error


# Of the cached counts. Raise it when label_mask, chat_templates or processing_mgm change them.
LENGTHS_VERSION = 1
RECORDS_PER_PROCESS = 20_000  # some ten seconds of tokenizing: fewer are not worth another process
MAX_PROCESSES = 16
TEMPLATE_ERRORS = (ValueError, TemplateError)  # of rendering a conversation
MEGA_BATCH = 50  # updates that are sorted together, as in transformers
Sample = dict[str, Any] | list[dict[str, Any]]  # of a ConversationDataset; packed: a row of them


def measure_lengths(dataset: datasets.Dataset, processor: MGMProcessor, max_length: int) -> datasets.Dataset:
    """Add `num_tokens` (before truncation) and `num_label_tokens` (after it) to every record.

    A record has 0 label tokens if truncation would cut one of its images or leaves nothing of its replies. The counts
    are cached, without the conversations. The cache's key covers all that they depend on, the code by LENGTHS_VERSION.
    """
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    dependencies = (dataset._fingerprint, tokenizer, processor.tokenizer.special_tokens_map, processor.chat_template)
    with naming_the_cache():
        lengths = dataset.map(
            lambda batch: count_batch(batch, processor, max_length),
            batched=True,
            batch_size=256,  # a thousand long conversations would hold a hundred megabytes of offsets
            num_proc=min(os.cpu_count() or 1, MAX_PROCESSES, len(dataset) // RECORDS_PER_PROCESS) or None,
            remove_columns=dataset.column_names,  # else the cache would hold the conversations once more
            new_fingerprint=Hasher.hash((*dependencies, processor.num_image_tokens, max_length, LENGTHS_VERSION)),
            desc="Measuring lengths",
        )
    return datasets.concatenate_datasets([dataset, lengths], axis=1)


def count_batch(batch: dict[str, list], processor: MGMProcessor, max_length: int) -> dict[str, np.ndarray]:
    """`count_tokens` of some records. Raises UserError for the first that the model's chat template cannot render."""
    try:
        return count_tokens(batch["conversations"], processor, max_length)
    except TEMPLATE_ERRORS:
        for record_id, conversation in zip(batch["id"], batch["conversations"], strict=True):
            try:
                processor.render([conversation])
            except TEMPLATE_ERRORS as error:
                raise UserError(f"record {record_id}: the model's chat template fails: {brief_error(error)}") from None
        raise


def count_tokens(conversations: list[list[dict]], processor: MGMProcessor, max_length: int) -> dict[str, np.ndarray]:
    """`num_tokens` and `num_label_tokens` of each conversation, without the lists that `processor.tokenize` builds.

    It is faster because it renders and tokenizes many at once and expands no image.
    """
    prompts, spans = processor.render(conversations)
    tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.no_truncation()  # as the transformers tokenizer does before each call
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(prompts, add_special_tokens=False)
    counts = [_count(*pair, processor, max_length) for pair in zip(encodings, spans, strict=True)]
    num_tokens, num_label_tokens = np.array(counts).T
    return {"num_tokens": num_tokens, "num_label_tokens": num_label_tokens}


def _count(encoding: Encoding, replies: list[Span], processor: MGMProcessor, max_length: int) -> tuple[int, int]:
    """Tokens of one conversation before truncation, and how many of those left after it carry a label."""
    input_ids, image_token_id = encoding.ids, processor.image_token_id
    num_tokens = len(input_ids) + input_ids.count(image_token_id) * (processor.num_image_tokens - 1)
    try:
        num_kept = count_fitting_tokens(input_ids, image_token_id, processor.num_image_tokens, max_length)
    except CutImage:
        return num_tokens, 0
    return num_tokens, len(find_label_tokens(encoding, input_ids, replies, image_token_id, num_kept))


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


def column_values(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers as an array, without a Python object for each."""
    return dataset.select_columns(name).with_format("numpy")[:][name]


def count_cut(records: datasets.Dataset, max_length: int) -> int:
    """How many measured records lose the end of their replies at `max_length` tokens, and an end of turn with it."""
    num_tokens, num_label_tokens = (column_values(records, name) for name in ("num_tokens", "num_label_tokens"))
    return int(np.sum((num_tokens > max_length) & (num_label_tokens > 0)))


class TrainCollator:
    """Samples of a ConversationDataset to forward's arguments. Runs in the loader's workers."""

    def __init__(self, processor: MGMProcessor, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return_freed_memory()  # of the batch before
        batch = self.processor(
            conversations=[sample["conversations"] for sample in samples],
            images=[sample["images"] for sample in samples],
            max_length=self.max_length,
            padding_side="right",
        )
        return {**batch, **find_positions(batch["input_ids"], batch["labels"], self.processor.image_token_id)}


def find_positions(
    input_ids: torch.LongTensor, labels: torch.LongTensor, image_token_id: int
) -> dict[str, torch.LongTensor]:
    """The flat positions (row * T + column) of the image tokens and of the tokens with a label in [B, T].

    Collators look them up on the CPU. On a GPU that would be a synchronisation at every step.
    """
    return {
        "image_positions": (input_ids == image_token_id).flatten().nonzero().squeeze(1),
        "label_positions": find_label_positions(labels),
    }


class BatchCollator:
    """Samples to a Batch, in shared memory if this is a worker. `collator` makes forward's arguments of them."""

    def __init__(self, collator: Callable[[list[Sample]], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, samples: list[Sample]) -> Batch:
        return Batch(share(self.collator(samples)), [sample["id"] for sample in flatten(samples) if "id" in sample])


def flatten(samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """The samples one after the other, also those that share a row."""
    for sample in samples:
        yield from sample if isinstance(sample, list) else [sample]
