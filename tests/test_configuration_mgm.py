"""The presets' sizes, against what is published of their parts."""

import pytest
import torch

from mgm.configuration_mgm import MODELS, PRESETS, MGMConfig, tiny
from mgm.modeling_mgm import MGMForConditionalGeneration


CLIP, CONVNEXT, MINING = 303_507_456, 196_227_264, 6_963_456
LANGUAGE_MODELS = {  # parameters with a head that is not tied, width; as their model cards have them
    "mgm-1.5b": (1_543_714_304, 1536),
    "mgm-2b": (2_506_172_416, 2048),
    "mgm-7b": (6_738_415_616, 4096),
    "mgm-8b": (8_030_261_248, 4096),
    "mgm-13b": (13_015_864_320, 5120),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    """Every model of the family, and its HD form, has its language model's parameters, the towers' and the joint's."""
    language_model, width = LANGUAGE_MODELS[name]
    projector = 1024 * width + width + width * width + width
    for preset in (name, f"{name}-hd"):
        with torch.device("meta"):
            model = MGMForConditionalGeneration(PRESETS[preset]())
        expected = language_model + CLIP + CONVNEXT + MINING + projector
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", MODELS)
def test_positions_of_an_image(name):
    """576, and in four crops and as a whole five times that; ConvNeXt's positions are shared out evenly."""
    normal, hd = PRESETS[name](), PRESETS[f"{name}-hd"]()
    assert (normal.num_image_tokens, hd.num_image_tokens) == (576, 2880)
    assert (normal.aux_grid_size, hd.aux_grid_size) == (192, 384)


@pytest.mark.parametrize("name", ["mgm-1.5b", "mgm-2b"])
def test_tied_heads(name):
    """Gemma's and Qwen2-1.5B's heads are their embeddings."""
    assert PRESETS[name]().tie_word_embeddings
    assert not PRESETS["mgm-7b"]().tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid": 3}, "16x16 positions cannot be shared out evenly among CLIP's 12x12 patches"),
        ({"image_global": True}, "choose image_grid 2 or more"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    """Crops that the auxiliary tower's positions do not divide into, and a whole image without crops."""
    with pytest.raises(ValueError, match=message):
        MGMConfig(**{**tiny().to_dict(), **changes})


def test_save_and_load_again(tmp_path):
    """Every field, that of the original's config included."""
    config = MGMConfig(**{**tiny().to_dict(), "image_grid": 2, "original_config": {"mm_hidden_size": 64}})
    config.save_pretrained(tmp_path)
    assert MGMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
