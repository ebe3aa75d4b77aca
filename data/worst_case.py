"""The largest batch that the data can bring. A prediction, a measurement and a run's rehearsal all use it."""

import math
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import ProcessorMixin

from chat.arguments import find_positions, forward_arguments, image_token_ids, per_token, set_token_types
from chat.encoding import num_image_tokens
from chat.expansion import processed
from chat.image_text import takes_images
from chat.images import PHOTO, Size, blank_image, shrunk_size
from data.sizes import IMAGE_SIZES
from layers.chunked_loss import IGNORE_INDEX
from step import StepConfig, needs_padding_mask
from utils import UserError


Config = TypeVar("Config", bound=StepConfig)
TEXT = "x"  # an ordinary token, between images and in the rest of a row


@dataclass(frozen=True)
class Row:
    """The largest row of a run's batches: the probed batch is made of such rows, every text position labelled."""

    num_tokens: int  # image positions counted
    num_images: int
    image_size: Size = PHOTO  # of each image as the data has it, before max_image_pixels


def longest_row(
    records: datasets.Dataset, num_tokens: np.ndarray, processor: ProcessorMixin, max_image_pixels: int = 0
) -> Row:
    """The longest row, given all rows' tokens, with as many images as any record has and the row can hold, each as
    large as the largest."""
    longest = int(num_tokens.max())
    num_images = pc.max(pc.list_value_length(records.data.column("images"))).as_py() or 0
    if num_images == 0:
        return Row(longest, 0)
    sizes = {PHOTO}  # nobody has read them where they do not matter
    if IMAGE_SIZES in records.column_names:
        sizes = {tuple(size) for row in records.select_columns(IMAGE_SIZES)[IMAGE_SIZES] for size in row}
    return fitting_row(processor, longest, num_images, sizes, max_image_pixels)


def fitting_row(
    processor: ProcessorMixin, num_tokens: int, num_images: int, sizes: set[Size], max_image_pixels: int
) -> Row:
    """A row of so many tokens, with images of the size that has most pixels when the processor sees it: as many as
    `num_images` and as there is room for."""
    size = max(sizes, key=lambda size: (math.prod(shrunk_size(size, max_image_pixels)), size))
    image_tokens = num_image_tokens(processor, shrunk_size(size, max_image_pixels), num_images)
    return Row(num_tokens, min(num_images, num_tokens // image_tokens), size)


def with_few_micro_batches(config: Config) -> Config:
    """A copy with two micro-batches an update at most. The second finds gradients of the first; a third would take no
    more memory than the second."""
    config = copy(config)
    config.gradient_accumulation_steps = min(config.gradient_accumulation_steps, 2)
    return config


def worst_case_batch(processor: ProcessorMixin | None, config: StepConfig, row: Row) -> dict[str, torch.Tensor]:
    """Forward's arguments as the collators make them: full rows, images first, every text position labelled.

    A packed row holds as many images as fit, whatever samples they belong to, and two samples, so that it needs a mask
    too.

    Args:
        processor: the model's own. It makes the images' part from blank images. None: a language model without a
            tokenizer; any number will do as a token.

    Raises:
        UserError: the images take more positions than a row has, or the model has no vision side.
    """
    rows, length = config.per_device_train_batch_size, row.num_tokens
    batch = full_rows(processor, config, row, rows, config.packing)
    batch["labels"] = batch["input_ids"].clone()
    if processor is not None:
        batch["labels"][torch.isin(batch["input_ids"], image_token_ids(processor))] = IGNORE_INDEX
        set_token_types(processor, batch)
    if config.packing:
        del batch["attention_mask"]
        batch["position_ids"] = torch.arange(length).remainder(length // 2 + 1).repeat(rows, 1)
    elif not needs_padding_mask(config):
        del batch["attention_mask"]
    elif rows > 1:  # attention needs a mask as soon as one row is padded
        batch["attention_mask"][-1, -1] = 0
    return batch | find_positions(processor, batch)


def worst_case_questions(processor: ProcessorMixin | None, config: StepConfig, row: Row) -> dict[str, torch.Tensor]:
    """A batch of prompts for generation. Prompt and answer fill the row, and the prompt is all of it but one token:
    that is where generation needs most memory."""
    image_length = 0
    if row.num_images and processor is not None:
        image_length = row.num_images * num_image_tokens(processor, photo_of(config, row), row.num_images)
    length = max(row.num_tokens - 1, image_length)  # images may fill the row
    rows = config.per_device_eval_batch_size
    batch = full_rows(processor, config, Row(length, row.num_images, row.image_size), rows)
    if rows > 1:
        batch["attention_mask"][-1, 0] = 0
        if length > image_length:  # the last row's tokens stand one further to the right, behind the padding
            for name in set(per_token(batch)) - {"attention_mask"}:
                batch[name][-1] = batch[name][-1].roll(1, dims=0)
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    if processor is not None:
        set_token_types(processor, batch)
    batch |= find_positions(processor, batch)
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "label_positions")}


def photo_of(config: StepConfig, row: Row) -> Size:
    """The size of the row's images as the processor sees them."""
    return shrunk_size(row.image_size, config.max_image_pixels)


def full_rows(
    processor: ProcessorMixin | None, config: StepConfig, row: Row, rows: int, packing: bool = False
) -> dict[str, torch.Tensor]:
    """So many rows of images, then text, up to the row's tokens: forward's arguments without labels.

    One row is made. Whatever a processor makes of many, it puts one after the other.
    """
    num_images, length = row.num_images, row.num_tokens
    if num_images and (processor is None or not takes_images(processor)):
        raise UserError(f"--images_per_sample {num_images}: the model has no vision side, so it takes 0")
    if processor is None:
        return {name: torch.ones(rows, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    if num_images:
        size = photo_of(config, row)
        image_length = num_image_tokens(processor, size, num_images)
        if num_images * image_length > length:
            raise too_long(num_images, num_images * image_length, length)
        if packing:
            num_images = length // image_length
        batch = images_alone(processor, size, num_images, length)
    else:
        batch = forward_arguments(processor, processed(processor, [TEXT], [[]])[0])
    return {name: repeated(tensor, rows) for name, tensor in extended(processor, batch, length).items()}


def repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def images_alone(processor: ProcessorMixin, size: Size, num_images: int, length: int) -> dict[str, torch.Tensor]:
    """A row of blank images, with text between them: adjacent images look like one to some models. Where that does not
    fit they stand side by side."""
    for between in (TEXT, ""):
        text = between.join([processor.image_token] * num_images)
        made, _ = processed(processor, [text], [[blank_image(size)] * num_images])
        batch = forward_arguments(processor, made)
        if batch["input_ids"].shape[1] <= length:
            return batch
    raise too_long(num_images, batch["input_ids"].shape[1], length)


def too_long(num_images: int, positions: int, length: int) -> UserError:
    what = "1 image takes" if num_images == 1 else f"{num_images} images take"
    enough = -(-positions // 256) * 256
    return UserError(
        f"--images_per_sample {num_images}: {what} {positions} positions, but max_seq_len is {length}; choose "
        f"--max_seq_len {enough}, or shrink images with --max_image_pixels"
    )


def extended(processor: ProcessorMixin, batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The batch, its rows followed by text up to `length`."""
    text_id = processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"][-1]
    fills = {"input_ids": text_id, "attention_mask": 1}
    for name in per_token(batch):
        tensor = batch[name]
        rows, present = tensor.shape[:2]
        if name == "cross_attention_mask":  # text sees what the row's last token sees
            added = tensor[:, -1:].expand(-1, length - present, *tensor.shape[2:])
        else:
            added = torch.full((rows, length - present, *tensor.shape[2:]), fills.get(name, 0), dtype=tensor.dtype)
        batch[name] = torch.cat([tensor, added], 1)[:, :length]
    return batch
