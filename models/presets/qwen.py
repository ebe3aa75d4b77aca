"""Qwen2.5-VL, Qwen3-VL and Qwen3.5."""

from collections.abc import Mapping

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

from models.presets.preset import Preset, byte_tokenizer, chat_template
from models.processors import VideoSettings


NAMES = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
TOKENS = {token: 151643 + i for i, token in enumerate(NAMES)}
TOKENS_3_5 = {token: 248044 + i for i, token in enumerate(NAMES)}
TEMPLATE = chat_template(
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    reply=("<|im_start|>assistant\n", "<|im_end|>"),
    image="<|vision_start|><|image_pad|><|vision_end|>",
    after="\n",
)
VISION_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
VISION_MEDIUM = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
VISION_SMALL = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
VISION_3 = {"patch_size": 16, "num_position_embeddings": 2304}


def image_ids(tokens: Mapping[str, int]) -> dict[str, int]:
    return {
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
    }


def end_ids(tokens: Mapping[str, int]) -> dict[str, int]:
    return {"eos_token_id": tokens["<|im_end|>"], "pad_token_id": tokens["<|endoftext|>"]}


def tokenizer_of(tokens: Mapping[str, int]) -> PreTrainedTokenizerFast:
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return byte_tokenizer(tokens, named, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def processor_2_5() -> Qwen2_5_VLProcessor:
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 12845056}),
        tokenizer_of(TOKENS),
        VideoSettings({"video_processor_type": "Qwen2VLVideoProcessor"}),
        chat_template=TEMPLATE,
    )


def processor_3(tokens: Mapping[str, int] = TOKENS) -> Qwen3VLProcessor:
    half = [0.5, 0.5, 0.5]
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 256**2, "longest_edge": 4096**2}, patch_size=16, image_mean=half, image_std=half
    )
    video = VideoSettings({"video_processor_type": "Qwen3VLVideoProcessor"})
    return Qwen3VLProcessor(images, tokenizer_of(tokens), video, chat_template=TEMPLATE)


def qwen2_5_vl(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool,
) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": tie_word_embeddings,
            **end_ids(TOKENS),
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden_size,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=tie_word_embeddings,
        **image_ids(TOKENS),
    )


def qwen3_vl(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vision: Mapping[str, int],
    deepstack: list[int],
    tie_word_embeddings: bool = True,
) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": rope,
            "tie_word_embeddings": tie_word_embeddings,
            **end_ids(TOKENS),
        },
        vision_config={
            **vision,
            **VISION_3,
            "out_hidden_size": hidden_size,
            "deepstack_visual_indexes": deepstack,
        },
        tie_word_embeddings=tie_word_embeddings,
        **image_ids(TOKENS),
    )


def qwen3_5(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    heads: tuple[int, int],
    linear_num_value_heads: int,
    vision: Mapping[str, int],
    tie_word_embeddings: bool = True,
) -> Qwen3_5Config:
    """Three layers of linear attention, then one of full attention. `heads`: of queries, and of keys and values.

    transformers leaves out the layer for multi-token prediction, which the published files hold too.
    """
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
    num_attention_heads, num_key_value_heads = heads
    return Qwen3_5Config(
        text_config={
            "vocab_size": 248320,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": linear_num_value_heads,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": rope,
            "tie_word_embeddings": tie_word_embeddings,
            **end_ids(TOKENS_3_5),
        },
        vision_config={**vision, **VISION_3, "out_hidden_size": hidden_size},
        tie_word_embeddings=tie_word_embeddings,
        **image_ids(TOKENS_3_5),
    )


PRESETS = {
    "qwen2.5-vl-3b": Preset(lambda: qwen2_5_vl(151936, 2048, 11008, 36, 16, 2, True), processor_2_5),
    "qwen2.5-vl-7b": Preset(lambda: qwen2_5_vl(152064, 3584, 18944, 28, 28, 4, False), processor_2_5),
    "qwen3-vl-2b": Preset(lambda: qwen3_vl(2048, 6144, 28, 16, VISION_MEDIUM, [5, 11, 17]), processor_3),
    "qwen3-vl-4b": Preset(lambda: qwen3_vl(2560, 9728, 36, 32, VISION_MEDIUM, [5, 11, 17]), processor_3),
    "qwen3-vl-8b": Preset(lambda: qwen3_vl(4096, 12288, 36, 32, VISION_LARGE, [8, 16, 24], False), processor_3),
    **{
        name: Preset(config, lambda: processor_3(TOKENS_3_5))
        for name, config in {
            "qwen3.5-0.8b": lambda: qwen3_5(1024, 3584, 24, (8, 2), 16, VISION_SMALL),
            "qwen3.5-2b": lambda: qwen3_5(2048, 6144, 24, (8, 2), 16, VISION_MEDIUM),
            "qwen3.5-4b": lambda: qwen3_5(2560, 9216, 32, (16, 4), 32, VISION_MEDIUM),
            "qwen3.5-9b": lambda: qwen3_5(4096, 12288, 32, (16, 4), 32, VISION_LARGE, False),
        }.items()
    },
}
