"""MGM's configuration: a language model, a CLIP tower, a ConvNeXt tower and how they are joined. Presets by name."""

from collections.abc import Callable

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.configuration_utils import SubConfigSpec


@strict
class MGMConfig(PreTrainedConfig):
    """Mini-Gemini (Li et al. 2024, arXiv:2403.18814).

    `text_config` is any causal language model's, `vision_config` CLIP's (the low resolution view) and
    `vision_config_aux` ConvNeXt's (the high resolution view). `image_token_id` marks an image position in `input_ids`;
    it has no row in the embedding matrix. In the HD variants CLIP sees an image in `image_grid` x `image_grid` crops
    and, with `image_global`, also as a whole.
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
    image_grid: int = 1
    image_global: bool = False
    original_config: dict | None = None  # config.json of the original checkpoint, for the way back
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        patches, aux_grid = self.image_grid * self.patch_grid_size, self.aux_grid_size
        if self.image_global and self.image_grid == 1:
            raise ValueError("image_global is for images in crops: choose image_grid 2 or more with it")
        if aux_grid % patches:
            raise ValueError(
                f"the auxiliary tower's {aux_grid}x{aux_grid} positions cannot be shared out evenly among CLIP's "
                f"{patches}x{patches} patches: choose vision_config_aux.image_size as a multiple of "
                f"{patches * self.vision_config_aux.patch_size}"
            )

    @property
    def patch_grid_size(self) -> int:
        """CLIP patches along one side of a view: 336 / 14 = 24."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def aux_grid_size(self) -> int:
        """Positions of ConvNeXt's first stage along one side of an image: 768 / 4 = 192."""
        return self.vision_config_aux.image_size // self.vision_config_aux.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Positions of the text sequence that one image needs: 576, or 2880 in four crops and as a whole."""
        return self.num_crops * self.patch_grid_size**2

    @property
    def num_crops(self) -> int:
        """CLIP's views of one image: its crops, and the whole image where CLIP sees that too."""
        return self.image_grid**2 + self.image_global

    def view_shapes(self, num_images: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of N images' `pixel_values`, [N, 3, H, H] or in K crops [N, K, 3, H, H], and `pixel_values_aux`,
        [N, 3, S, S]."""
        low, high = self.vision_config.image_size, self.vision_config_aux.image_size
        crops = () if self.num_crops == 1 else (self.num_crops,)
        return (num_images, *crops, 3, low, low), (num_images, 3, high, high)


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


def convnext_large() -> ConvNextConfig:
    """The trunk of OpenCLIP's convnext_large_d_320, 196,227,264 parameters."""
    return ConvNextConfig(
        hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3], image_size=768, layer_norm_eps=1e-6
    )


def with_towers(text_config: PreTrainedConfig, image_token_id: int) -> MGMConfig:
    """The released models differ in their language model only."""
    return MGMConfig(
        text_config=text_config,
        vision_config=clip_large_336(),
        vision_config_aux=convnext_large(),
        image_token_id=image_token_id,
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
    return with_towers(text_config, image_token_id=256000)


def mgm_7b() -> MGMConfig:
    """The released MGM-7B: Vicuna-7B v1.5."""
    return with_towers(LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5), image_token_id=32000)


def mgm_13b() -> MGMConfig:
    """The released MGM-13B: Vicuna-13B v1.5."""
    text_config = LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return with_towers(text_config, image_token_id=32000)


def mgm_8b() -> MGMConfig:
    """The released MGM-8B: Llama-3-8B-Instruct."""
    text_config = LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=128000,
        eos_token_id=128009,
    )
    return with_towers(text_config, image_token_id=128256)


def mgm_1_5b() -> MGMConfig:
    """Never released: Qwen2-1.5B instead of Gemma, for GPUs on which MGM-2B does not fit."""
    text_config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=151643,
        eos_token_id=151645,
        pad_token_id=151643,
    )
    # The tokenizer has 151,646 entries: <image> gets one of the matrix's spare rows, which is never read.
    return with_towers(text_config, image_token_id=151646)


def hd(config: MGMConfig) -> MGMConfig:
    """The HD form of a model, with the same weights: 1536 pixels instead of 768 for ConvNeXt, and for CLIP four crops
    and the whole image."""
    config.vision_config_aux.image_size *= 2
    config.image_grid, config.image_global = 2, True
    return config


def tiny() -> MGMConfig:
    """MGM's architecture with small numbers: 16 positions per image, about 1.2 M parameters."""
    text_config = GemmaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
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


MODELS = {"mgm-1.5b": mgm_1_5b, "mgm-2b": mgm_2b, "mgm-7b": mgm_7b, "mgm-8b": mgm_8b, "mgm-13b": mgm_13b}
NORMAL = {"tiny": tiny, **MODELS}
PRESETS: dict[str, Callable[[], MGMConfig]] = NORMAL | {
    f"{name}-hd": lambda model=model: hd(model()) for name, model in NORMAL.items()
}

AutoConfig.register(MGMConfig.model_type, MGMConfig)
