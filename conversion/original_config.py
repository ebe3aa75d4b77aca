"""Read the original MGM's config.json into an MGMConfig, and write one back."""

from itertools import count
from pathlib import Path

import torch
from transformers import AutoConfig, CLIPVisionConfig, ConvNextConfig, PreTrainedConfig

from conversion.original_files import ORIGINAL_FILES
from conversion.weight_files import Tensors, read_json
from mgm.configuration_mgm import MGMConfig, clip_large_336
from mgm.processing_mgm import MGMProcessor
from utils import UserError


# Language models and the original's model types. Its Llama variant was the first and is plain "mgm".
MODEL_TYPES = {"llama": "mgm", "gemma": "mgm_gemma", "mistral": "mgm_mistral", "qwen2": "mgm_qwen2"}
# The original tells towers apart by these words in their paths.
CLIP_NAME = "model_zoo/OpenAI/clip-vit-large-patch14-336"
CONVNEXT_NAMES = {
    192: "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
    128: "model_zoo/OpenAI/openclip-convnext-base-w-320-laion-aesthetic-s13B-b82K",
    384: "model_zoo/OpenAI/openclip-convnext-xxlarge-laion2B-s34B-b82K-augreg-soup",
}
# Keys of transformers 5 that the original's transformers 4.38 spells differently or does not know.
NEW_KEYS = {"rope_parameters", "layer_types", "use_bidirectional_attention"}


def read_original(folder: Path) -> dict:
    """The original's config.json. Raises UserError where it is another model's."""
    original = read_json(folder / "config.json")
    if "text_config" in original:
        raise UserError(f"--from_original {folder}: it is in transformers' layout already")
    for key in ("model_type", "mm_vision_tower", "mm_vision_tower_aux"):
        if key not in original:
            raise UserError(f"--from_original {folder}: its config.json has no {key}, so it is no MGM's")
    return original


def joint_config(
    text_config: PreTrainedConfig, clip: Path | None, convnext: Path | None, tensors: Tensors, original: dict | None
) -> MGMConfig:
    """An MGMConfig of its three parts, with the sizes of the original or, where there is none, of MGM-2B."""
    known = original or {"image_size_aux": 768}
    vision_config = clip_config(known.get("mm_vision_tower", ""), clip)
    vision_config_aux = convnext_config(tensors, known.get("image_size_aux", 320), convnext)
    try:
        return MGMConfig(
            text_config=text_config,
            vision_config=vision_config,
            vision_config_aux=vision_config_aux,
            image_grid=known.get("image_grid", 1),
            image_global=known.get("image_global", False),
            original_config=original,
        )
    except ValueError as error:
        raise UserError(f"the parts do not fit together: {error}") from None


def text_config(original: dict) -> PreTrainedConfig:
    """The language model's part of the original's flat config: mgm_gemma -> gemma, mgm -> llama."""
    model_type = original["model_type"].removeprefix("mgm").removeprefix("_") or "llama"
    if not original["model_type"].startswith("mgm") or model_type not in MODEL_TYPES:
        raise UserError(
            f"config.json has model_type {original['model_type']!r}: expected {', '.join(MODEL_TYPES.values())}"
        )
    names = AutoConfig.for_model(model_type).to_dict().keys()
    names -= {"model_type", "dtype", "architectures", "transformers_version", "_name_or_path"}
    known = {name: original[name] for name in names if name in original}
    if "rope_theta" in original or original.get("rope_scaling"):
        scaling = dict(original.get("rope_scaling") or {"rope_type": "default"})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        known["rope_parameters"] = {"rope_theta": original.get("rope_theta", 10000.0), **scaling}
    if model_type == "gemma":  # Gemma's first release has a wrong hidden_act, which transformers never read
        known["hidden_act"] = original.get("hidden_activation") or "gelu_pytorch_tanh"
    return AutoConfig.for_model(model_type, **known)


def clip_config(name: str, folder: Path | None) -> CLIPVisionConfig:
    """CLIP's config from its folder. Without one the tower's name must be that of the released models."""
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"--vision_tower {folder}: there is no config.json in it")
        return CLIPVisionConfig.from_pretrained(folder)
    if Path(name).name == "clip-vit-large-patch14-336":
        return clip_large_336()
    raise UserError(f"the tower {name} is not beside the checkpoint: give --vision_tower DIR")


def convnext_config(tensors: Tensors, image_size: int, folder: Path | None = None) -> ConvNextConfig:
    """Widths and depths as the tensors have them. Every OpenCLIP ConvNeXt takes 4x4 patches."""
    blocks = "model.vision_tower_aux.encoder.stages.{}.layers.{}.dwconv.bias"
    depths = [next(j for j in count() if blocks.format(i, j) not in tensors) for i in range(4)]
    if 0 in depths:
        missing = ", ".join(str(i) for i in range(4) if depths[i] == 0)
        raise UserError(f"the ConvNeXt weights lack stages {missing} of 0 to 3")
    hidden_sizes = [len(tensors[blocks.format(i, 0)]) for i in range(4)]
    eps = convnext_eps(folder, hidden_sizes)
    return ConvNextConfig(hidden_sizes=hidden_sizes, depths=depths, image_size=image_size, layer_norm_eps=eps)


def convnext_eps(folder: Path | None, hidden_sizes: list[int]) -> float:
    """The LayerNorms' epsilon, which no tensor shows: timm has 1e-5 in convnext_xxlarge and 1e-6 in all others."""
    is_xxlarge = hidden_sizes[0] == 384
    if folder is not None and (folder / "open_clip_config.json").is_file():
        open_clip = read_json(folder / "open_clip_config.json")
        name = open_clip.get("model_cfg", open_clip).get("vision_cfg", {}).get("timm_model_name")
        is_xxlarge = is_xxlarge if name is None else "xxlarge" in name
    return 1e-5 if is_xxlarge else 1e-6


def original_config(folder: Path, config: MGMConfig, dtype: torch.dtype, processor: MGMProcessor) -> dict:
    """config.json to hand back: the original's where the model came from it, else a derived one.

    `processor` is the one last trained with: its image_aspect_ratio may differ. `dtype` counts after training, which
    leaves no copy of the original's files in `folder`.
    """
    if config.original_config is None:
        length = processor.tokenizer.model_max_length
        return derive_original(config, dtype, processor.image_aspect_ratio, length if length < 2**31 else 2048)
    original = dict(config.original_config)
    if processor.image_aspect_ratio != original.get("image_aspect_ratio", "pad"):
        original["image_aspect_ratio"] = processor.image_aspect_ratio
    if not (folder / ORIGINAL_FILES).is_dir():
        original["torch_dtype"] = str(dtype).removeprefix("torch.")
    return original


def derive_original(
    config: MGMConfig, dtype: torch.dtype, image_aspect_ratio: str = "pad", tokenizer_model_max_length: int = 2048
) -> dict:
    """config.json for the original's code, of a model that did not come from it."""
    aux_widths = config.vision_config_aux.hidden_sizes
    return {
        **flat_text_config(config.text_config),
        "image_aspect_ratio": image_aspect_ratio,
        "image_global": config.image_global,
        "image_grid": config.image_grid,
        "image_size_aux": config.vision_config_aux.image_size,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_hidden_size_aux": sum(aux_widths),
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": CLIP_NAME,
        "mm_vision_tower_aux": CONVNEXT_NAMES.get(aux_widths[0], CONVNEXT_NAMES[192]),
        "optimize_vision_tower": False,
        "optimize_vision_tower_aux": False,
        "tokenizer_model_max_length": tokenizer_model_max_length,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_mm_proj": True,
    }


def flat_text_config(config: PreTrainedConfig) -> dict:
    """A language model's config as transformers 4.38 wrote it, with every value spelled out."""
    unknown = (PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}) | NEW_KEYS
    flat = {key: value for key, value in config.to_dict().items() if key not in unknown}
    scaling = dict(config.rope_parameters)
    flat["rope_theta"] = scaling.pop("rope_theta")
    flat["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    if flat["rope_scaling"]["type"] == "default":
        flat["rope_scaling"] = None
    if config.model_type == "gemma":
        flat["hidden_activation"] = flat["hidden_act"]
    flat["model_type"] = MODEL_TYPES[config.model_type]
    flat["architectures"] = [f"MGM{config.model_type.capitalize()}ForCausalLM"]
    return flat
