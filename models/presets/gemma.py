"""Gemma 3 and Gemma 4."""

from transformers import (
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    SiglipVisionConfig,
)

from models.presets.preset import Preset, byte_tokenizer, chat_template, square
from models.processors import VideoSettings


FIRST = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
IDS = {"bos_token_id": 2, "pad_token_id": 0}
TOKENS_3 = FIRST | {
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "<start_of_image>": 255999,
    "<end_of_image>": 256000,
    "<image_soft_token>": 262144,
}
TOKENS_4 = FIRST | {
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255999,
    "<|audio>": 256000,
    "<|image|>": 258880,
    "<|audio|>": 258881,
    "<image|>": 258882,
    "<audio|>": 258883,
    "<|video|>": 258884,
}


def siglip(image_size: int, **more: int) -> SiglipVisionConfig:
    """SigLIP So400m/14."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=image_size,
        vision_use_head=False,
        **more,
    )


def gemma3_4b() -> Gemma3Config:
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    return Gemma3Config(
        text_config={
            "vocab_size": 262208,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "rope_parameters": {
                "full_attention": full,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "eos_token_id": [1, 106],
            **IDS,
        },
        vision_config=siglip(896),
        mm_tokens_per_image=256,
        eos_token_id=[1, 106],
    )


def processor_3() -> Gemma3Processor:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    template = chat_template(
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        reply=("<start_of_turn>model\n", "<end_of_turn>"),
        image="<start_of_image>",
        start="<bos>",
        after="\n",
    )
    tokenizer = byte_tokenizer(TOKENS_3, named, **ROLES)
    images = Gemma3ImageProcessorPil(size=square(896))
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=256)


def gemma4(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_key_value_heads: int,
    num_kv_shared_layers: int,
    sliding_window_pattern: int,
    use_double_wide_mlp: bool,
) -> Gemma4Config:
    """The small ones, which also hear. Every `sliding_window_pattern`-th layer sees all of the text."""
    kinds = ["sliding_attention"] * (sliding_window_pattern - 1) + ["full_attention"]
    return Gemma4Config(
        text_config={
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
            "hidden_size": hidden_size,
            "hidden_size_per_layer_input": 256,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": num_key_value_heads,
            "num_kv_shared_layers": num_kv_shared_layers,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 512,
            "layer_types": kinds * (num_hidden_layers // sliding_window_pattern),
            "use_double_wide_mlp": use_double_wide_mlp,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 131072,
            "eos_token_id": [1, 106],
            **IDS,
        },
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "head_dim": 64,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 10240,
            "use_clipped_linears": True,
        },
        audio_config={},
        eos_token_id=[1, 106],
    )


def processor_4() -> Gemma4Processor:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    template = chat_template(
        user=("<|turn>user\n", "<turn|>\n"),
        reply=("<|turn>model\n", "<turn|>"),
        image="<|image|>",
        start="<bos>",
        after="\n",
    )
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessorPil(max_soft_tokens=280),
        byte_tokenizer(TOKENS_4, named, **ROLES),
        VideoSettings({"video_processor_type": "Gemma4VideoProcessor"}),
        chat_template=template,
        image_seq_length=280,
    )


PRESETS = {
    "gemma-3-4b": Preset(gemma3_4b, processor_3),
    "gemma-4-e2b": Preset(lambda: gemma4(1536, 6144, 35, 1, 20, 5, True), processor_4),
    "gemma-4-e4b": Preset(lambda: gemma4(2560, 10240, 42, 2, 18, 6, False), processor_4),
}
