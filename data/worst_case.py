"""The largest batch that the data can bring. A prediction, a measurement and a run's rehearsal all use it."""

from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig

from layers.chunked_loss import FIRST_LABEL, IGNORE_INDEX
from mgm.configuration_mgm import MGMConfig
from step import StepConfig


Config = TypeVar("Config", bound=StepConfig)


@dataclass(frozen=True)
class Row:
    """The largest row of a run's batches: the probed batch is made of such rows, every text position labelled."""

    num_tokens: int  # image positions counted
    num_images: int


def longest_row(records: datasets.Dataset, num_tokens: np.ndarray, num_image_tokens: int) -> Row:
    """The longest row, given all rows' tokens, with as many images as any record has and the row can hold."""
    longest = int(num_tokens.max())
    num_images = pc.max(pc.list_value_length(records.data.column("images"))).as_py() or 0
    return Row(longest, min(num_images, longest // num_image_tokens))


def with_few_micro_batches(config: Config) -> Config:
    """A copy with two micro-batches an update at most. The second finds gradients of the first; a third would take no
    more memory than the second."""
    config = copy(config)
    config.gradient_accumulation_steps = min(config.gradient_accumulation_steps, 2)
    return config


def with_rows_of(config: Config, num_tokens: int) -> Config:
    """A copy with rows of `num_tokens`."""
    config = copy(config)  # dataclasses.replace would check all flags again, and a probe's launch config
    config.max_seq_len = num_tokens
    return config


def worst_case_batch(
    model_config: PreTrainedConfig, config: StepConfig, images_per_sample: int
) -> dict[str, torch.Tensor]:
    """Forward's arguments as the collators make them: full rows, images first, every text position labelled.

    A packed row holds as many images as fit, whatever samples they belong to, and two samples, so that it needs a mask
    too. A model without a vision side gets what transformers' language models take.

    Raises:
        ValueError: the images take more positions than a row has.
    """
    rows, length = config.per_device_train_batch_size, config.max_seq_len
    if not hasattr(model_config, "image_token_id"):
        return text_batch(rows, length, images_per_sample)
    image_length = images_per_sample * model_config.num_image_tokens
    if image_length > length:
        what = "1 image takes" if images_per_sample == 1 else f"{images_per_sample} images take"
        raise ValueError(f"{what} {image_length} positions, but max_seq_len is {length}")
    if config.packing and images_per_sample:
        images_per_sample = length // model_config.num_image_tokens
        image_length = images_per_sample * model_config.num_image_tokens
    input_ids = torch.zeros(rows, length, dtype=torch.long)
    input_ids[:, :image_length] = model_config.image_token_id
    labels = input_ids.clone()
    labels[:, :image_length] = IGNORE_INDEX
    batch = {"input_ids": input_ids, "labels": labels}
    batch["image_positions"] = (torch.arange(rows)[:, None] * length + torch.arange(image_length)).flatten()
    batch["label_positions"] = (
        torch.arange(rows)[:, None] * length + torch.arange(max(image_length, FIRST_LABEL), length)
    ).flatten()
    if config.packing:
        batch["position_ids"] = torch.arange(length).remainder(length // 2 + 1).repeat(rows, 1)
    else:
        batch["attention_mask"] = mask_of(rows, length)
    if images_per_sample:
        batch |= black_images(model_config, rows * images_per_sample)
    return batch


def worst_case_questions(
    model_config: PreTrainedConfig, config: StepConfig, images_per_sample: int
) -> dict[str, torch.Tensor]:
    """A batch of prompts for generation. Prompt and answer fill `max_seq_len`, and the prompt is all of it but one
    token: that is where generation needs most memory."""
    image_length = images_per_sample * getattr(model_config, "num_image_tokens", 0)
    prompts = with_rows_of(config, max(config.max_seq_len - 1, image_length))  # images may fill the row
    prompts.per_device_train_batch_size, prompts.packing = config.per_device_eval_batch_size, False
    batch = worst_case_batch(model_config, prompts, images_per_sample)
    # `generate` warns of a prompt that ends with padding, and token 0 is often the padding token.
    batch["input_ids"][:, image_length:] = 1
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "label_positions")}


def black_images(model_config: MGMConfig, num_images: int) -> dict[str, torch.Tensor]:
    """Both views of black images."""
    low, high = (torch.zeros(shape) for shape in model_config.view_shapes(num_images))
    return {"pixel_values": low, "pixel_values_aux": high}


def text_batch(rows: int, length: int, images_per_sample: int) -> dict[str, torch.Tensor]:
    """The worst case for a language model alone. Raises ValueError for images."""
    if images_per_sample:
        raise ValueError("the model has no vision side, so it takes 0")
    input_ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids.clone(), "attention_mask": mask_of(rows, length)}


def mask_of(rows: int, length: int) -> torch.Tensor:
    """Full rows. Of several the last is one token short: attention needs a mask as soon as one row is padded."""
    mask = torch.ones(rows, length, dtype=torch.long)
    if rows > 1:
        mask[-1, -1] = 0
    return mask
