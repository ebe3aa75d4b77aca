"""Finds the parts of any model of transformers: its language model, its head, its vision tower, and their paths."""

from torch import nn
from transformers import PreTrainedModel


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder that reads text, without the head that makes logits."""
    decoder = model
    while isinstance(inner := decoder.get_decoder(), PreTrainedModel) and inner is not decoder:
        decoder = inner  # Llama 4's is a language model with a head, around the decoder itself
    return decoder


def vision_tower(model: PreTrainedModel) -> nn.Module | None:
    """The module that encodes images; None for a model that reads text alone, or images without a tower."""
    tower = model.get_encoder("image")
    return None if tower is model or tower is model.base_model else tower


def path_of(model: nn.Module, part: nn.Module) -> str:
    """The part's name among `model.named_modules()`. Raises ValueError if it is not in the model."""
    for path, module in model.named_modules():
        if module is part:
            return path
    raise ValueError(f"{type(model).__name__} has no such {type(part).__name__} in it")
