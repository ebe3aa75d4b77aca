"""Forward's arguments among what a processor makes, and what has to be added to them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import ProcessorMixin

from layers.chunked_loss import IGNORE_INDEX, find_label_positions


NOT_FOR_FORWARD = ("offset_mapping", "text_replacement_offsets", "labels", "num_crops")


def forward_arguments(processor: ProcessorMixin, made: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among what the processor made that are for forward, numbers with a fraction in fp32.

    Raises:
        ValueError: something else is among them.
    """
    arguments = {}
    for name, value in made.items():
        # Many tokenizers make `token_type_ids`, all of them 0, for models that have no such argument.
        if name in NOT_FOR_FORWARD or (name == "token_type_ids" and not names_itself(processor, name)):
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{type(processor).__name__} makes {name} as a {type(value).__name__}, not as a tensor")
        arguments[name] = value.float() if value.is_floating_point() else value
    return arguments


def names_itself(processor: ProcessorMixin, name: str) -> bool:
    """Whether the processor, not its tokenizer alone, says that forward takes this argument."""
    return processor.model_input_names.count(name) > processor.tokenizer.model_input_names.count(name)


def set_token_types(processor: ProcessorMixin, batch: dict[str, torch.Tensor]) -> None:
    """Mark what is learned, and all after it, where the model attends to the rest in both directions: PaliGemma's
    `token_type_ids` are 0 for the prefix, 1 for the suffix. Other models' say what an image is; they stay."""
    if "suffix" in inspect.signature(type(processor).__call__).parameters:
        batch["token_type_ids"] = (batch["labels"] != IGNORE_INDEX).long().cummax(1).values


def find_positions(processor: ProcessorMixin | None, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The flat positions (row * T + column) of the tokens with a label in [B, T], and of the image tokens for a model
    that asks for them.

    Collators look them up on the CPU. On a GPU that would be a synchronisation at every step.
    """
    positions = {"label_positions": find_label_positions(batch["labels"])}
    if processor is not None and "image_positions" in processor.model_input_names:
        is_image = batch["input_ids"] == processor.image_token_id
        positions["image_positions"] = is_image.flatten().nonzero().squeeze(1)
    return positions


def per_token(batch: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of what has a value, or several, for each token: [B, T, ...]."""
    shape = batch["input_ids"].shape
    return [name for name, tensor in batch.items() if tensor.shape[:2] == shape]


def cut(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The batch, padded on the right, without its columns from `length` on."""
    if length >= batch["input_ids"].shape[1]:
        return batch
    return batch | {name: batch[name][:, :length].contiguous() for name in per_token(batch)}


def image_token_ids(processor: ProcessorMixin) -> torch.Tensor:
    """The tokens that stand for images."""
    if not hasattr(processor, "image_token"):
        return torch.tensor([], dtype=torch.long)
    image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)  # Janus's has no image_token_id
    ids = {image_token_id, *processor.image_token_ids} - {None}
    return torch.tensor(sorted(ids))
