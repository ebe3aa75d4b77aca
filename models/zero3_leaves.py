"""Layers that ZeRO-3 and FSDP2 gather as a whole, instead of one small module after the other.

Each gathering costs the host hooks and bookkeeping: MGM-2B's 1,939 in a step took half a second, its 200 of whole
layers a tenth of that. A layer is on the GPU a little longer than its parts would be.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from models.family import family_of


MOST_ELEMENTS = 240_000_000  # as stage3_max_live_parameters: larger layers, of experts, are gathered in parts


def gather_layers_whole(model: PreTrainedModel) -> None:
    """Mark the layers for DeepSpeed. Other stages of ZeRO do not read the mark."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers_to_gather(model):
        set_z3_leaf_module(layer, True)


def layers_to_gather(model: PreTrainedModel) -> Iterator[nn.Module]:
    """All layers of a decoder or tower, but the first that is trained: its input may need no gradient, and DeepSpeed
    would then take a layer's gradients before they are there."""
    layers = set(whole_layers(model))
    for parent in model.modules():
        trained_before = False
        for layer in parent.children():
            if layer in layers:
                is_trained = any(parameter.requires_grad for parameter in layer.parameters())
                is_small = sum(num_elements(parameter) for parameter in layer.parameters()) <= MOST_ELEMENTS
                if is_small and (trained_before or not is_trained):
                    yield layer
                trained_before |= is_trained


def whole_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of decoder and towers, each of which is called as a whole."""
    others = family_of(model.config).gathered_whole
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in others:
            yield module


def num_elements(parameter: nn.Parameter) -> int:
    """Also of one that ZeRO-3 has split."""
    return getattr(parameter, "ds_numel", parameter.numel())
