"""Rename tensors: the original MGM's names to ours and back, CLIP's and OpenCLIP's to ours."""

import re


# (original's prefix, ours). {} is a number. The first row that a name begins with replaces its prefix; a name that
# begins with none (lm_head.weight) is the same in both.
NAMES = [
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower_aux.vision_stem.0.", "model.vision_tower_aux.embeddings.patch_embeddings."),
    ("model.vision_tower_aux.vision_stem.1.", "model.vision_tower_aux.embeddings.layernorm."),
    *(
        (f"model.vision_tower_aux.vision_stages.{{}}.{theirs}", f"model.vision_tower_aux.encoder.stages.{{}}.{ours}")
        for theirs, ours in (
            ("downsample.{}.", "downsampling_layer.{}."),
            ("blocks.{}.conv_dw.", "layers.{}.dwconv."),
            ("blocks.{}.norm.", "layers.{}.layernorm."),
            ("blocks.{}.mlp.fc1.", "layers.{}.pwconv1."),
            ("blocks.{}.mlp.fc2.", "layers.{}.pwconv2."),
            ("blocks.{}.gamma", "layers.{}.layer_scale_parameter"),
        )
    ),
    ("model.vlm_uni_query_projector.", "model.patch_info_mining.query_proj."),
    ("model.vlm_uni_aux_projector.", "model.patch_info_mining.key_proj."),
    ("model.vlm_uni_val_projector.", "model.patch_info_mining.value_proj."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
]
CLIP_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")


def rename_original(name: str) -> str | None:
    """The original's name of a tensor to ours; None for a buffer that transformers computes itself."""
    if name.endswith(("rotary_emb.inv_freq", "position_ids")):
        return None
    return _replace_prefix(name, NAMES)


def rename_ours(name: str) -> str:
    """Our name of a tensor to the original's."""
    return _replace_prefix(name, [(ours, theirs) for theirs, ours in NAMES])


def rename_open_clip(name: str) -> str | None:
    """A name inside an OpenCLIP checkpoint to ours; None for all but the stem and stages of the image trunk."""
    trunk = re.fullmatch(r"visual\.trunk\.(stem|stages)\.(.*)", name)
    return rename_original(f"model.vision_tower_aux.vision_{trunk[1]}.{trunk[2]}") if trunk else None


def rename_clip(name: str) -> str | None:
    """A name inside a CLIPModel or CLIPVisionModel (transformers 5 saves the latter without `vision_model.`) to ours;
    None for the text half and the projections."""
    if name.endswith("position_ids") or not name.startswith(("vision_model.", *CLIP_PARTS)):
        return None
    return "model.vision_tower." + name.removeprefix("vision_model.")


def _replace_prefix(name: str, names: list[tuple[str, str]]) -> str:
    for old, new in names:
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return new.format(*match.groups()) + name[match.end() :]
    return name
