"""From conversations to batches: how long each sample is, which samples make up an update, and their collation."""

from collections.abc import Iterator

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher

from processing_mgm import IGNORE_INDEX, MGMProcessor


def measure_lengths(dataset: datasets.Dataset, processor: MGMProcessor, max_length: int) -> datasets.Dataset:
    """Add `num_tokens` (before truncation) and `num_label_tokens` (after it) to every record.

    A record whose image would be cut, or of whose replies nothing is left, has 0 label tokens. Tokenized once and
    cached: the fingerprint covers everything that the lengths depend on.
    """

    def lengths(record: dict) -> dict[str, int]:
        input_ids, labels = processor.tokenize(record["conversations"])
        cuts_image = processor.image_token_id in input_ids[max_length:]
        num_label_tokens = sum(label != IGNORE_INDEX for label in labels[1:max_length])
        return {"num_tokens": len(input_ids), "num_label_tokens": 0 if cuts_image else num_label_tokens}

    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    dependencies = (dataset._fingerprint, tokenizer, processor.chat_template, processor.num_image_tokens, max_length)
    return dataset.map(lengths, new_fingerprint=Hasher.hash(dependencies), desc="Measuring lengths")


class UpdateBatchSampler:
    """Micro-batches in the order of training: update by update, step by step, process by process.

    An update has the same samples whatever way they are shared out among micro-batches and processes, so that
    1 x 8, 4 x 2 and 2 processes x 4 train alike. Accelerate deals the micro-batches out, one to each process in turn.
    """

    batch_size = None  # the last update of an epoch may have smaller micro-batches; accelerate must not pad them
    drop_last = False

    def __init__(
        self,
        num_label_tokens: np.ndarray,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        num_processes: int,
        seed: int,
    ) -> None:
        self.num_label_tokens = num_label_tokens
        self.micro_batch_size = micro_batch_size
        self.update_size = micro_batch_size * gradient_accumulation_steps * num_processes
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def update_sizes(self) -> list[int]:
        """How many samples each update of an epoch has; only the last may have fewer than the others."""
        num_full, num_left = divmod(len(self.num_label_tokens), self.update_size)
        return [self.update_size] * num_full + [size for size in [self._num_even(num_left)] if size]

    def updates(self) -> list[np.ndarray]:
        """The epoch's samples, shuffled by seed and epoch, an array of indices for each update."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.num_label_tokens))
        ends = np.cumsum(self.update_sizes(), dtype=int)
        return np.split(order, ends)[:-1]  # what lies behind the last end is left out

    def label_tokens_per_update(self) -> list[int]:
        """How many label tokens each update's loss is the mean over, all processes together."""
        return [int(self.num_label_tokens[update].sum()) for update in self.updates()]

    def num_updates(self) -> int:
        return len(self.update_sizes())

    def __iter__(self) -> Iterator[list[int]]:
        for update in self.updates():
            for micro_batch in np.array_split(update, self._num_micro_batches(len(update))):
                yield micro_batch.tolist()

    def __len__(self) -> int:
        return sum(self._num_micro_batches(size) for size in self.update_sizes())

    def _num_micro_batches(self, num_samples: int) -> int:
        steps = -(-num_samples // (self.micro_batch_size * self.num_processes))
        return steps * self.num_processes

    def _num_even(self, num_samples: int) -> int:
        """How many of an epoch's last samples can be shared out so that no process is left without one."""
        if self._num_micro_batches(num_samples) > num_samples:
            return num_samples // self.num_processes * self.num_processes
        return num_samples


class TrainCollator:
    """Samples of a ConversationDataset to forward's arguments. Runs in the loader's workers."""

    def __init__(self, processor: MGMProcessor, max_length: int, image_aspect_ratio: str) -> None:
        self.processor = processor
        self.max_length = max_length
        self.image_aspect_ratio = image_aspect_ratio

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.processor(
            conversations=[sample["conversations"] for sample in samples],
            images=[sample["images"] for sample in samples],
            max_length=self.max_length,
            image_aspect_ratio=self.image_aspect_ratio,
            padding_side="right",
        )
        # Looked up here, on the CPU: on a GPU it would be a synchronisation at every step.
        is_image = batch["input_ids"] == self.processor.image_token_id
        return {**batch, "image_positions": is_image.flatten().nonzero().squeeze(1)}
