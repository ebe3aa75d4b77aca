"""The names: one to one onto the released model's list, both ways, and into the towers' own files."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from conversion.names import rename_clip, rename_open_clip, rename_original, rename_ours
from mgm.configuration_mgm import mgm_2b, tiny
from mgm.modeling_mgm import MGMForConditionalGeneration


def parameter_shapes(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def released(reference_folder: Path) -> dict[str, tuple[int, ...]]:
    """The released MGM-2B's tensors but for the tied head: the original's names and shapes."""
    lines = (reference_folder / "mgm2b_keys.txt").read_text().splitlines()
    rows = [line.split("\t")[:2] for line in lines if not line.startswith("#")]
    shapes = {name: tuple(int(size) for size in re.findall(r"\d+", shape)) for name, shape in rows}
    del shapes["lm_head.weight"]
    return shapes


def test_names_are_the_released_models(released):
    """The released MGM-2B's tensors, renamed, with the parameters of the preset: one to one, shapes equal."""
    assert len(released) == 911
    renamed = {rename_original(name): shape for name, shape in released.items()}
    assert len(renamed) == len(released)
    assert renamed == parameter_shapes(mgm_2b())


def test_both_directions_are_inverse(released):
    """The released names there and back, and the preset's back and there."""
    assert [rename_ours(rename_original(name)) for name in released] == list(released)
    ours = parameter_shapes(mgm_2b())
    assert {rename_ours(name) for name in ours} == released.keys()
    assert [rename_original(rename_ours(name)) for name in ours] == list(ours)


@pytest.mark.parametrize("backbone", [LlamaConfig, MistralConfig, Qwen2Config], ids=lambda c: c.model_type)
def test_untied_backbones(backbone):
    """Backbones with a head of their own (and Qwen2's biases): every name differs from its original's, but the
    head's, and comes back."""
    config = tiny()
    config.text_config = backbone(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.tie_word_embeddings = False
    names = list(parameter_shapes(config))
    assert ("model.language_model.layers.1.self_attn.k_proj.bias" in names) == (backbone is Qwen2Config)
    assert [name for name in names if rename_ours(name) == name] == ["lm_head.weight"]
    assert [rename_original(rename_ours(name)) for name in names] == names
    assert len({rename_ours(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.layers.1.self_attn.q_proj.bias", "model.language_model.layers.1.self_attn.q_proj.bias"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("model.vlm_uni_aux_projector.1.weight", "model.patch_info_mining.key_proj.1.weight"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.3.mlp.fc1.bias",
        ),
        (
            "model.vision_tower_aux.vision_stages.2.blocks.26.mlp.fc2.weight",
            "model.vision_tower_aux.encoder.stages.2.layers.26.pwconv2.weight",
        ),
        (
            "model.vision_tower_aux.vision_stages.0.blocks.2.gamma",
            "model.vision_tower_aux.encoder.stages.0.layers.2.layer_scale_parameter",
        ),
    ],
)
def test_spelled_out(original, ours):
    """Names written by hand, both ways."""
    assert rename_original(original) == ours
    assert rename_ours(ours) == original


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ],
)
def test_buffers_are_left_out(name):
    """What older transformers saved and newer ones compute."""
    assert rename_original(name) is None


def test_open_clip():
    """The trunk's stem and stages are taken; its final norm, the heads and the text half are not."""
    assert rename_open_clip("visual.trunk.stem.1.bias") == "model.vision_tower_aux.embeddings.layernorm.bias"
    stage = "model.vision_tower_aux.encoder.stages.1."
    assert rename_open_clip("visual.trunk.stages.1.downsample.0.weight") == stage + "downsampling_layer.0.weight"
    assert rename_open_clip("visual.trunk.stages.1.blocks.0.norm.weight") == stage + "layers.0.layernorm.weight"
    for name in ("visual.trunk.norm_pre.weight", "visual.trunk.head.norm.weight", "visual.head.proj.weight"):
        assert rename_open_clip(name) is None
    assert rename_open_clip("text.transformer.resblocks.0.mlp.c_fc.weight") is None
    assert rename_open_clip("logit_scale") is None


def test_clip():
    """The vision half is taken, with and without its prefix; the text half and the projections are not."""
    for prefix in ("vision_model.", ""):
        assert rename_clip(prefix + "pre_layrnorm.bias") == "model.vision_tower.pre_layrnorm.bias"
        assert rename_clip(prefix + "encoder.layers.0.layer_norm1.bias").endswith(
            "tower.encoder.layers.0.layer_norm1.bias"
        )
        assert rename_clip(prefix + "embeddings.position_ids") is None
    for name in ("text_model.encoder.layers.0.layer_norm1.bias", "visual_projection.weight", "logit_scale"):
        assert rename_clip(name) is None
