"""Finds the parts of any model of transformers: its language model, its head, its vision tower, and their paths."""

from torch import nn
from transformers import PreTrainedModel


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder that reads text, without the head that makes logits."""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT calls its head a decoder
        decoder = model.base_model
    while inner := _child_with(decoder, embeddings):
        decoder = inner  # Llama 4's is a language model with a head, around the decoder itself
    return decoder


def _child_with(model: nn.Module, embeddings: nn.Module) -> PreTrainedModel | None:
    children = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next((child for child in children if any(part is embeddings for part in child.modules())), None)


def vision_tower(model: PreTrainedModel) -> nn.Module | None:
    """The module that encodes images; None for a model that reads text alone, or images without a tower."""
    return _encoder(model, "image")


def towers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that encode what is not text."""
    return [tower for modality in ("image", "audio") if (tower := _encoder(model, modality)) is not None]


def _encoder(model: PreTrainedModel, modality: str) -> nn.Module | None:
    encoder = model.get_encoder(modality)
    return None if encoder is model or encoder is model.base_model else encoder


def path_of(model: nn.Module, part: nn.Module) -> str:
    """The part's name among `model.named_modules()`. Raises ValueError if it is not in the model."""
    for path, module in model.named_modules():
        if module is part:
            return path
    raise ValueError(f"{type(model).__name__} has no such {type(part).__name__} in it")


def unused_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that the loss does not depend on, and that therefore cannot be trained: by the model's own method,
    or the tower's layers after the one whose features the config names."""
    if hasattr(model.base_model, "unused_modules"):
        return model.base_model.unused_modules()
    chosen = getattr(model.config, "vision_feature_layer", None)
    encoder = getattr(vision_tower(model), "encoder", None)
    if chosen is None or not hasattr(encoder, "layers"):
        return []
    num_features = len(encoder.layers) + 1  # the embeddings' too
    num_used = max(layer % num_features for layer in ([chosen] if isinstance(chosen, int) else chosen))
    norm = getattr(vision_tower(model), "post_layernorm", None)
    return [*encoder.layers[num_used:], *([norm] if norm is not None else [])]
