"""The largest batch that can come: what a prediction, a measurement and a run's rehearsal take for their step."""

from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig

from mgm.configuration_mgm import MGMConfig
from mgm.processing_mgm import IGNORE_INDEX


Config = TypeVar("Config")


@dataclass(frozen=True)
class Row:
    """The largest row of a run's batches: the probed batch is made of such rows, every text position labelled."""

    num_tokens: int  # image positions counted
    num_images: int


def with_few_micro_batches(config: Config) -> Config:
    """A copy of a StepConfig with two micro-batches an update at most: from the second one on gradients are there, and
    every further one takes the same memory."""
    config = copy(config)
    config.gradient_accumulation_steps = min(config.gradient_accumulation_steps, 2)
    return config


def with_rows_of(config: Config, num_tokens: int) -> Config:
    """A copy of a StepConfig with rows of `num_tokens`. (`replace` would look at the flags anew, at folders too.)"""
    config = copy(config)
    config.max_seq_len = num_tokens
    return config


def worst_case_batch(model_config: PreTrainedConfig, config: Any, images_per_sample: int) -> dict[str, torch.Tensor]:
    """Forward's arguments as train.py's collator makes them: full rows, images first, every text position labelled.

    `config` is a StepConfig.
    A row that is shorter than the others is padded, and then attention needs a mask. So with several rows the last one
    lacks a token. A packed row has as many images as there is room for, whatever samples they belong to, and at least
    two samples, so that it needs a mask. A model without a vision side gets what transformers' language models take.

    Raises:
        ValueError: the images take more positions than a row has.
    """
    rows, length = config.per_device_train_batch_size, config.max_seq_len
    if not hasattr(model_config, "image_token_id"):
        return text_batch(rows, length, images_per_sample)
    image_length = images_per_sample * model_config.num_image_tokens
    if image_length > length:
        raise ValueError(f"{images_per_sample} images take {image_length} positions, but max_seq_len is {length}")
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
        torch.arange(rows)[:, None] * length + torch.arange(max(image_length, 1), length)
    ).flatten()
    if config.packing:
        batch["position_ids"] = torch.arange(length).remainder(length // 2 + 1).repeat(rows, 1)
    else:
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
        if rows > 1:
            batch["attention_mask"][-1, -1] = 0
    if images_per_sample:
        batch |= black_images(model_config, rows * images_per_sample)
    return batch


def worst_case_questions(
    model_config: PreTrainedConfig, config: Any, images_per_sample: int
) -> dict[str, torch.Tensor]:
    """A batch of prompts for generation: prompt and answer together fill `max_seq_len`, and all of it but a token is
    the prompt, which is where generation takes most. `config` is a StepConfig."""
    image_length = images_per_sample * getattr(model_config, "num_image_tokens", 0)
    prompts = with_rows_of(config, max(config.max_seq_len - 1, image_length))  # images may fill the row
    prompts.per_device_train_batch_size, prompts.packing = config.per_device_eval_batch_size, False
    batch = worst_case_batch(model_config, prompts, images_per_sample)
    # generate warns of a prompt that ends with padding, and token 0 is often what pads.
    batch["input_ids"][:, image_length:] = 1
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "label_positions")}


def black_images(model_config: MGMConfig, num_images: int) -> dict[str, torch.Tensor]:
    """Both views of images that are black all over."""
    low, high = (torch.zeros(shape) for shape in model_config.view_shapes(num_images))
    return {"pixel_values": low, "pixel_values_aux": high}


def text_batch(rows: int, length: int, images_per_sample: int) -> dict[str, torch.Tensor]:
    """The worst case for a language model alone. Raises ValueError for images."""
    if images_per_sample:
        raise ValueError("the model has no vision side, so it takes 0")
    batch = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
    batch |= {"labels": batch["input_ids"].clone(), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if rows > 1:
        batch["attention_mask"][-1, -1] = 0
    return batch


def longest_row(records: datasets.Dataset, num_tokens: np.ndarray, num_image_tokens: int) -> Row:
    """The longest row, given all rows' tokens, with as many images as any record has and the row can hold."""
    longest = int(num_tokens.max())
    num_images = pc.max(pc.list_value_length(records.data.column("images"))).as_py() or 0
    return Row(longest, min(num_images, longest // num_image_tokens))
