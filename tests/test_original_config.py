"""config.json both ways: sizes, epsilons, rotary settings, and that what is derived is read as it was meant."""

import json
from pathlib import Path

import pytest
import torch

from conversion.original_config import clip_config, convnext_config, derive_original, text_config
from mgm.configuration_mgm import PRESETS
from utils import UserError


@pytest.mark.parametrize("preset", PRESETS)
def test_derived_and_read_again(preset):
    """Every preset's language model with the one read from the original config.json derived for it."""
    config = PRESETS[preset]()
    original = json.loads(json.dumps(derive_original(config, torch.bfloat16)))
    assert text_config(original).to_dict() == config.text_config.to_dict()
    assert (original["image_grid"], original["image_global"]) == (config.image_grid, config.image_global)
    assert original["image_size_aux"] == config.vision_config_aux.image_size
    assert original["mm_hidden_size_aux"] == sum(config.vision_config_aux.hidden_sizes)


def test_released_models():
    """Vicuna's config.json as MGM-7B has it: what is not in it are Llama's defaults, the head is its own."""
    config = text_config({"model_type": "mgm", "hidden_size": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32000})
    assert config.model_type == "llama" and config.rms_norm_eps == 1e-5 and not config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_gemmas_activation(hidden_act):
    """Gemma's first config.json says gelu and means its tanh form; hidden_activation is what counts."""
    config = {"model_type": "mgm_gemma", "hidden_act": hidden_act}
    assert text_config(config).hidden_act == "gelu_pytorch_tanh"
    assert text_config(config | {"hidden_activation": None}).hidden_act == "gelu_pytorch_tanh"
    assert text_config(config | {"hidden_activation": "relu"}).hidden_act == "relu"


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_scaled_positions(key):
    """rope_scaling in both spellings."""
    scaling = {key: "linear", "factor": 4.0}
    config = text_config({"model_type": "mgm", "rope_theta": 5000.0, "rope_scaling": scaling})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}


def convnext_infos(widths: list[int], depths: list[int]) -> dict[str, torch.Tensor]:
    stages = "model.vision_tower_aux.encoder.stages"
    return {
        f"{stages}.{i}.layers.{j}.dwconv.bias": torch.empty(width, device="meta")
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
        for j in range(depth)
    }


FORMS = {
    "convnext_base": ([128, 256, 512, 1024], [3, 3, 27, 3], 1e-6),
    "convnext_large": ([192, 384, 768, 1536], [3, 3, 27, 3], 1e-6),
    "convnext_xxlarge": ([384, 768, 1536, 3072], [3, 4, 30, 3], 1e-5),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_convnext(form, tmp_path):
    """OpenCLIP's three sizes from their tensors alone, and with open_clip_config.json: timm's epsilon for each."""
    widths, depths, eps = FORMS[form]
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"timm_model_name": form}}})
    )
    for folder in (None, tmp_path, Path("nowhere")):
        config = convnext_config(convnext_infos(widths, depths), 768, folder)
        assert (config.hidden_sizes, config.depths, config.layer_norm_eps) == (widths, depths, eps)
        assert (config.image_size, config.patch_size) == (768, 4)


def test_timms_name_wins(tmp_path):
    """A model of xxlarge's first width that timm calls otherwise."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"vision_cfg": {"timm_model_name": "convnext_other"}}))
    config = convnext_config(convnext_infos([384, 8, 8, 8], [1, 1, 1, 1]), 768, tmp_path)
    assert config.layer_norm_eps == 1e-6


def test_a_convnext_that_lacks_stages():
    with pytest.raises(UserError, match="lack stages 1, 3 of 0 to 3"):
        convnext_config(convnext_infos([8, 8, 8, 8], [1, 0, 1, 0]), 768)


def test_clips_config(tmp_path):
    """The released models' CLIP is known by name; of another one the folder is needed, with a config in it."""
    assert clip_config("model_zoo/OpenAI/clip-vit-large-patch14-336", None).hidden_size == 1024
    with pytest.raises(UserError, match="give --vision_tower DIR"):
        clip_config("another", None)
    with pytest.raises(UserError, match="there is no config.json in it"):
        clip_config("another", tmp_path)
