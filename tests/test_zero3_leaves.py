"""Which layers ZeRO-3 gathers as a whole."""

import pytest
from deepspeed.utils import get_z3_leaf_modules
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from models import zero3_leaves
from models.family import Family
from models.zero3_leaves import layers_to_gather
from step import StepConfig, build_model


def leaves(is_deepspeed: bool = True, **flags: object) -> list[str]:
    """The paths of the layers that DeepSpeed would gather as a whole, of tiny MGM."""
    model = build_model(StepConfig(model="tiny", mixed_precision="no", **flags), is_deepspeed)
    marked = set(get_z3_leaf_modules(model))
    return [name.removeprefix("base_model.model.model.") for name, module in model.named_modules() if module in marked]


def test_layers_of_the_decoder_and_of_the_towers() -> None:
    """But the decoder's first: of a row of text its input needs no gradient, and its gradients would be lost."""
    decoder = [f"language_model.layers.{index}" for index in (1, 2, 3)]
    clip = [f"vision_tower.encoder.layers.{index}" for index in range(3)]
    convnext = [f"vision_tower_aux.encoder.stages.{index}" for index in range(4)]
    assert sorted(leaves()) == sorted([*decoder, *clip, *convnext])
    assert leaves(is_deepspeed=False) == []


def test_a_towers_first_trained_layer_is_left_out() -> None:
    found = leaves(lora_vision_tower=True)
    assert [name for name in found if name.startswith("vision_tower.")] == [
        "vision_tower.encoder.layers.1",
        "vision_tower.encoder.layers.2",  # MGM reads the layer before it, so it is not trained
    ]


def test_layers_before_the_first_trained_one_have_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """So they can be gathered as a whole; one that is too large is not."""

    class Layer(GradientCheckpointingLayer):
        def __init__(self, size: int, is_trained: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(size, 1, bias=False).requires_grad_(is_trained)

    layers = [Layer(*each) for each in ((1, False), (1, False), (1, True), (1, True), (9, True), (1, False))]
    model = nn.ModuleList(layers)
    model.config = StepConfig(model="tiny")
    monkeypatch.setattr(zero3_leaves, "family_of", lambda _: Family())
    monkeypatch.setattr(zero3_leaves, "MOST_ELEMENTS", 8)
    assert [layers.index(layer) for layer in layers_to_gather(model)] == [0, 1, 3, 5]
