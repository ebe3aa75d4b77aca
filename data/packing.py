"""Several conversations with their images in one row: which samples share a row, and their collation.

A packed batch marks its samples by `position_ids`, which start at 0 again with each sample. From them transformers
keeps the samples from attending to one another: `eager` and `sdpa` get a block-diagonal mask, `flash_attention_2`
variable lengths (it looks for them only in batches of a single row). transformers does so only if the batch has no
`attention_mask`, so a packed batch has none.
"""

from bisect import bisect_left, insort

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from chat.arguments import find_positions, per_token
from data.batching import TrainCollator
from data.dataset import FILLER
from layers.chunked_loss import IGNORE_INDEX


class Packing:
    """Which samples share a row. `order`: all samples, row after row. `starts`: where in `order` each row begins."""

    def __init__(self, order: np.ndarray, starts: np.ndarray) -> None:
        self.order = order
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> np.ndarray:
        """The samples of a row."""
        end = self.starts[row + 1] if row + 1 < len(self) else len(self.order)
        return self.order[self.starts[row] : end]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """For each row, the sum of `values` over its samples. `values` has a number for each sample."""
        return np.add.reduceat(values[self.order], self.starts)


def pack(num_tokens: np.ndarray, row_length: int, seed: int) -> Packing:
    """Put each sample into the fullest row of `row_length` tokens that has room for it, or into a new row.

    Samples longer than a quarter of a row come first, longest first (best-fit decreasing). The others keep the order
    that `seed` shuffles: sorting them would not fill rows better, and dozens of equally long samples, often with one
    kind of question, would share a row.

    Args:
        num_tokens: of each sample, none above `row_length`.
    """
    order = np.random.default_rng(seed).permutation(len(num_tokens))
    is_long = num_tokens[order] > row_length // 4
    order = order[np.argsort(-num_tokens[order] * is_long, kind="stable")]
    row_of = np.empty(len(num_tokens), dtype=int)
    rows_with: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the tokens left in them
    rooms: list[int] = []  # sorted: the numbers of tokens left that some row has
    num_rows = 0
    for place, length in enumerate(num_tokens[order].tolist()):
        found = bisect_left(rooms, length)
        if found == len(rooms):
            row, room = num_rows, row_length
            num_rows += 1
        else:
            room = rooms[found]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[found]
        row_of[place] = row
        room -= length
        if room:
            if not rows_with[room]:
                insort(rooms, room)
            rows_with[room].append(row)
    by_row = np.argsort(row_of, kind="stable")
    starts = np.flatnonzero(np.diff(row_of[by_row], prepend=-1))
    return Packing(order[by_row], starts)


class PackedDataset(torch.utils.data.Dataset):
    """The rows of a packing, each a list of the data set's samples."""

    def __init__(self, dataset: torch.utils.data.Dataset, packing: Packing) -> None:
        self.dataset = dataset
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, row: int | None) -> list[dict]:
        if row is FILLER:
            return [self.dataset[FILLER]]
        return [self.dataset[index] for index in self.packing[row].tolist()]


class PackedCollator(TrainCollator):
    """Rows of samples to forward's arguments [R, T]: T is the longest row's tokens, `position_ids` replace the mask.

    Images stay in reading order over the batch. Padding has position 0, so each padding token is its own sequence.
    """

    def __call__(self, rows: list[list[dict]]) -> dict[str, torch.Tensor]:
        batch = super().__call__([sample for row in rows for sample in row])  # a row for each sample
        is_token = batch.pop("attention_mask").bool()
        lengths = is_token.sum(1).split([len(row) for row in rows])
        batch["position_ids"] = torch.arange(is_token.shape[1]).expand_as(is_token)
        fills = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
        for name in per_token(batch):
            row_tokens = batch[name][is_token].split([int(each.sum()) for each in lengths])
            batch[name] = pad_sequence(row_tokens, batch_first=True, padding_value=fills.get(name, 0))
        return {**batch, **find_positions(self.processor, batch)}
