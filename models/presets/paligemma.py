"""PaliGemma 2."""

from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessorPil

from models.family import PALIGEMMA
from models.presets.gemma import FIRST, IDS, ROLES, siglip
from models.presets.preset import Preset, byte_tokenizer, square


# PaliGemma's processor adds those that stand for places and outlines, if they are missing.
TOKENS = (
    FIRST
    | {f"<loc{i:04}>": 256000 + i for i in range(1024)}
    | {f"<seg{i:03}>": 257024 + i for i in range(128)}
    | {"<image>": 257152}
)


def paligemma2_3b() -> PaliGemmaConfig:
    """At 224 pixels."""
    text_config = Gemma2Config(
        vocab_size=257216,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
    )
    return PaliGemmaConfig(
        vision_config=siglip(224, projection_dim=2304),
        text_config=text_config,
        image_token_index=TOKENS["<image>"],
        projection_dim=2304,
        hidden_size=2304,
        vocab_size=257216,
        eos_token_id=1,
        **IDS,
    )


def processor() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size=square(224))
    images.image_seq_length = 256
    tokenizer = byte_tokenizer(TOKENS, {"image_token": "<image>"}, **ROLES)
    return PaliGemmaProcessor(images, tokenizer, chat_template=PALIGEMMA)


PRESETS = {"paligemma2-3b": Preset(paligemma2_3b, processor)}
