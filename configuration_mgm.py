"""MGM's configuration: a text backbone, a CLIP tower, a ConvNeXt tower and how they are joined. Presets by name."""

from collections.abc import Callable

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, ConvNextConfig, GemmaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class MGMConfig(PreTrainedConfig):
    """Mini-Gemini (Li et al. 2024, arXiv:2403.18814).

    `text_config` is any causal language model's, `vision_config` CLIP's (the low resolution view) and
    `vision_config_aux` ConvNeXt's (the high resolution view). `image_token_id` marks an image position in `input_ids`;
    it has no row in the embedding matrix.
    """

    model_type = "mgm"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gemma"),
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig),
        "vision_config_aux": SubConfigSpec(config_class=ConvNextConfig),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vision_config_aux: dict | PreTrainedConfig | None = None
    image_token_id: int = 256000
    vision_feature_layer: int = -2
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        grid, aux_grid = self.image_grid_size, self.aux_grid_size
        if aux_grid % grid:
            raise ValueError(
                f"the auxiliary tower's {aux_grid}x{aux_grid} positions cannot be shared out evenly among CLIP's "
                f"{grid}x{grid} patches: choose vision_config_aux.image_size as a multiple of "
                f"{grid * self.vision_config_aux.patch_size}"
            )

    @property
    def image_grid_size(self) -> int:
        """CLIP patches along one side of an image: 336 / 14 = 24."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def aux_grid_size(self) -> int:
        """Positions of ConvNeXt's first stage along one side of an image: 768 / 4 = 192."""
        return self.vision_config_aux.image_size // self.vision_config_aux.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Positions of the text sequence that one image takes: 576."""
        return self.image_grid_size**2


def clip_large_336() -> CLIPVisionConfig:
    """openai/clip-vit-large-patch14-336, 303,507,456 parameters."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=336,
        projection_dim=768,
    )


def convnext_large(image_size: int = 768) -> ConvNextConfig:
    """The trunk of OpenCLIP's convnext_large_d_320, 196,227,264 parameters. It takes images of any multiple of 32."""
    return ConvNextConfig(
        hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3], image_size=image_size, layer_norm_eps=1e-6
    )


def mgm_2b() -> MGMConfig:
    """The released MGM-2B: Gemma-2B, 3,019,166,144 parameters."""
    text_config = GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
    )
    return MGMConfig(text_config=text_config, vision_config=clip_large_336(), vision_config_aux=convnext_large())


def tiny() -> MGMConfig:
    """MGM's architecture with small numbers: 16 positions an image, about 1.2 M parameters."""
    text_config = GemmaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=14,
        image_size=56,
        projection_dim=16,
    )
    vision_config_aux = ConvNextConfig(
        hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], image_size=64, layer_norm_eps=1e-6
    )
    return MGMConfig(
        text_config=text_config, vision_config=vision_config, vision_config_aux=vision_config_aux, image_token_id=512
    )


PRESETS: dict[str, Callable[[], MGMConfig]] = {"tiny": tiny, "mgm-2b": mgm_2b}

AutoConfig.register(MGMConfig.model_type, MGMConfig)
