"""Tiny models of transformers' families: real classes with small numbers, each with its processor.

All share a byte-level tokenizer that has the special tokens of every family.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_torchvision_available

from models.processors import VideoSettings, processor_class


SEED = 0
VOCAB_SIZE = 640
SPECIAL_TOKENS = """<pad> <s> </s> <unk> <image> <video> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>
<fake_token_around_image> <global-img> <end_of_utterance> <|im_start|> <|im_end|> <start_of_image> <end_of_image>
<image_soft_token> <audio_soft_token> <start_of_audio> <end_of_audio> <IMG_CONTEXT> <img> </img> [IMG] [IMG_BREAK]
[IMG_END] <|begin_of_image|> <|image|> <|end_of_image|> <|video|> <|begin_of_video|> <|end_of_video|>
<|media_begin|> <|media_content|> <|media_pad|> <|media_end|> <|kimi_k25_video_placeholder|> <|START_OF_IMG|>
<|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE_GLOBAL <|image_start|> <|image_end|> <|img_row_1_col_1|>
<|img_thumbnail|> <|patch|> <|tile_x_separator|> <|tile_y_separator|> <IMG_ATOM> <IMG_START> <IMG_GRID> <IMG_COL>
<IMG_ROW> <IMG_END> <|python_tag|> <imgpad>""".split()
SPECIAL_TOKENS += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
SPECIAL_TOKENS += [f"TILE_{i}" for i in range(1, 13)]
TOKEN_IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}  # 256 bytes come before
NAMED_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NAMED_IDS = {f"{name}_id": TOKEN_IDS[token] for name, token in NAMED_TOKENS.items() if name != "unk_token"}
END_TOKENS = [TOKEN_IDS["</s>"], TOKEN_IDS["<|im_end|>"]]

IMAGE_MARK = "IMAGE"  # stands in CHATML for what a family writes where an image is
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# --- configs ---------------------------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    **NAMED_IDS,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN3_VISION = QWEN_VISION | {
    "patch_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
QWEN_IDS = {
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def clip(image_size: int = 56) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**VISION, image_size=image_size, patch_size=14, projection_dim=16)


def siglip(image_size: int = 56, **more: Any) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**VISION, image_size=image_size, patch_size=14, **more)


def llava() -> PreTrainedConfig:
    return tf.LlavaConfig(
        vision_config=clip(),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=TOKEN_IDS["<image>"],
        image_seq_length=16,
    )


def llava_next() -> PreTrainedConfig:
    return tf.LlavaNextConfig(
        vision_config=clip(),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=TOKEN_IDS["<image>"],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )


def llava_onevision() -> PreTrainedConfig:
    return tf.LlavaOnevisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=TOKEN_IDS["<image>"],
        video_token_index=TOKEN_IDS["<video>"],
        image_grid_pinpoints=PINPOINTS,
    )


def qwen2_vl() -> PreTrainedConfig:
    return tf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": {"type": "mrope", **MROPE}},
        vision_config=QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        **QWEN_IDS,
    )


def qwen2_5_vl() -> PreTrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [2],
    }
    return tf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": dict(MROPE)}, vision_config=QWEN_VISION | vision, **QWEN_IDS
    )


def _qwen3_vl_config(config_class: type[PreTrainedConfig], **text: Any) -> PreTrainedConfig:
    return config_class(
        text_config=TEXT | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_interleaved": True}} | text,
        vision_config=QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    )


def qwen3_vl() -> PreTrainedConfig:
    return _qwen3_vl_config(tf.Qwen3VLConfig)


def qwen3_vl_moe() -> PreTrainedConfig:
    return _qwen3_vl_config(tf.Qwen3VLMoeConfig, **EXPERTS)


def _qwen3_5_config(config_class: type[PreTrainedConfig], **text: Any) -> PreTrainedConfig:
    rope = {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    linear = {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    sizes = {"num_hidden_layers": 4, "head_dim": 16, "rope_parameters": MROPE | rope}
    return config_class(text_config=TEXT | sizes | linear | text, vision_config=dict(QWEN3_VISION), **QWEN_IDS)


def qwen3_5() -> PreTrainedConfig:
    return _qwen3_5_config(tf.Qwen3_5Config)


def qwen3_5_moe() -> PreTrainedConfig:
    return _qwen3_5_config(tf.Qwen3_5MoeConfig, **EXPERTS, shared_expert_intermediate_size=32)


def _idefics3_config(config_class: type[PreTrainedConfig], vision_type: str) -> PreTrainedConfig:
    return config_class(
        vision_config=VISION | {"image_size": 56, "patch_size": 14, "model_type": vision_type},
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=TOKEN_IDS["<image>"],
        scale_factor=2,
        **NAMED_IDS,
    )


def idefics3() -> PreTrainedConfig:
    return _idefics3_config(tf.Idefics3Config, "idefics3_vision")


def smolvlm() -> PreTrainedConfig:
    return _idefics3_config(tf.SmolVLMConfig, "smolvlm_vision")


def idefics2() -> PreTrainedConfig:
    return tf.Idefics2Config(
        vision_config=VISION | {"image_size": 56, "patch_size": 14},
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        text_config=tf.MistralConfig(**TEXT, head_dim=16),
        image_token_id=TOKEN_IDS["<image>"],
    )


def _paligemma_config(text: PreTrainedConfig) -> PreTrainedConfig:
    return tf.PaliGemmaConfig(
        vision_config=siglip(projection_dim=64, vision_use_head=False),
        text_config=text,
        image_token_index=TOKEN_IDS["<image>"],
        projection_dim=64,
        hidden_size=64,
        vocab_size=VOCAB_SIZE,
        **NAMED_IDS,
    )


def paligemma() -> PreTrainedConfig:
    return _paligemma_config(tf.GemmaConfig(**TEXT, head_dim=16))


def paligemma2() -> PreTrainedConfig:
    return _paligemma_config(tf.Gemma2Config(**TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=32))


def gemma3() -> PreTrainedConfig:
    sliding = {"sliding_window": 32, "query_pre_attn_scalar": 16, "layer_types": SLIDING}
    return tf.Gemma3Config(
        text_config=TEXT | {"head_dim": 16} | sliding,
        vision_config=siglip(112, vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=TOKEN_IDS["<start_of_image>"],
        eoi_token_index=TOKEN_IDS["<end_of_image>"],
        image_token_index=TOKEN_IDS["<image_soft_token>"],
    )


def gemma3n() -> PreTrainedConfig:
    """Its vision tower is timm's: without timm only the config and the processor can be made."""
    text = {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE - 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [128] * 4,
    }
    audio = {
        "hidden_size": 32,
        "vocab_size": 4,
        "vocab_offset": VOCAB_SIZE - 4,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "input_feat_size": 32,
        "sscp_conv_channel_size": [8, 8],
    }
    return tf.Gemma3nConfig(
        text_config=TEXT | text,
        vision_config={"hidden_size": 2048, "vocab_size": 4, "vocab_offset": VOCAB_SIZE - 8},
        audio_config=audio,
        boi_token_id=TOKEN_IDS["<start_of_image>"],
        eoi_token_id=TOKEN_IDS["<end_of_image>"],
        image_token_id=TOKEN_IDS["<image_soft_token>"],
        audio_token_id=TOKEN_IDS["<audio_soft_token>"],
        vision_soft_tokens_per_image=256,
    )


def gemma4(audio_config: dict[str, Any] | None = None, **text: Any) -> PreTrainedConfig:
    sizes = {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    }
    vision = {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 256,
    }
    return tf.Gemma4Config(
        text_config=TEXT | sizes | text,
        vision_config=VISION | vision,
        audio_config=audio_config,
        boi_token_id=TOKEN_IDS["<start_of_image>"],
        eoi_token_id=TOKEN_IDS["<end_of_image>"],
        image_token_id=TOKEN_IDS["<image_soft_token>"],
        video_token_id=TOKEN_IDS["<|video|>"],
        audio_token_id=TOKEN_IDS["<audio_soft_token>"],
        boa_token_id=TOKEN_IDS["<start_of_audio>"],
        eoa_token_index=TOKEN_IDS["<end_of_audio>"],
    )


def gemma4_moe() -> PreTrainedConfig:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    return gemma4(**experts, hidden_size_per_layer_input=0)


def gemma4_sharing() -> PreTrainedConfig:
    """As Gemma 4 E2B and E4B: later layers take the keys and values of earlier ones."""
    return gemma4(num_kv_shared_layers=2)


def gemma4_audio() -> PreTrainedConfig:
    """As Gemma 4 E2B and E4B: with an audio encoder, and layers that take the keys and values of others."""
    audio = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "output_proj_dims": 64,
        "subsampling_conv_channels": [8, 4],
    }
    return gemma4(audio, num_kv_shared_layers=2, use_double_wide_mlp=True)


def internvl() -> PreTrainedConfig:
    return tf.InternVLConfig(
        vision_config=VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=TOKEN_IDS["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def pixtral() -> PreTrainedConfig:
    """Pixtral-12B: LLaVA's class around Pixtral's tower and Mistral."""
    return tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**VISION, image_size=128, patch_size=16),
        text_config=tf.MistralConfig(**TEXT, head_dim=16),
        image_token_index=TOKEN_IDS["[IMG]"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )


def mistral3() -> PreTrainedConfig:
    return tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION, image_size=128, patch_size=16),
        text_config=tf.MistralConfig(**TEXT, head_dim=16),
        image_token_index=TOKEN_IDS["[IMG]"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


GLM_IDS = {
    "image_token_id": TOKEN_IDS["<|image|>"],
    "video_token_id": TOKEN_IDS["<|video|>"],
    "image_start_token_id": TOKEN_IDS["<|begin_of_image|>"],
    "image_end_token_id": TOKEN_IDS["<|end_of_image|>"],
    "video_start_token_id": TOKEN_IDS["<|begin_of_video|>"],
    "video_end_token_id": TOKEN_IDS["<|end_of_video|>"],
}
GLM_VISION = QWEN_VISION | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "image_size": 112}
GLM_ROPE = {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}


def glm4v() -> PreTrainedConfig:
    return tf.Glm4vConfig(text_config=TEXT | GLM_ROPE, vision_config=dict(GLM_VISION), **GLM_IDS)


def glm4v_moe() -> PreTrainedConfig:
    experts = {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
    }
    return tf.Glm4vMoeConfig(text_config=TEXT | GLM_ROPE | experts, vision_config=dict(GLM_VISION), **GLM_IDS)


def deepseek_v3() -> PreTrainedConfig:
    sizes = {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    return tf.DeepseekV3Config(**TEXT | sizes)


def kimi_k25() -> PreTrainedConfig:
    return tf.Kimi_K25Config(
        text_config=deepseek_v3(),
        vision_config=VISION | {"patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        image_token_id=TOKEN_IDS["<|media_pad|>"],
        video_token_id=TOKEN_IDS["<|kimi_k25_video_placeholder|>"],
        vision_start_token_id=TOKEN_IDS["<|media_begin|>"],
        vision_end_token_id=TOKEN_IDS["<|media_end|>"],
        tie_word_embeddings=False,
    )


def lfm2_vl() -> PreTrainedConfig:
    return tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(**VISION, patch_size=16, num_patches=16),
        text_config=tf.Lfm2Config(**TEXT, layer_types=["conv", "conv", "full_attention"]),
        image_token_id=TOKEN_IDS["<image>"],
        projector_hidden_size=64,
    )


def ovis2() -> PreTrainedConfig:
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    return tf.Ovis2Config(
        vision_config=VISION | {"image_size": 56, "patch_size": 14, "vocab_size": 64, "hidden_stride": 2},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=TOKEN_IDS["<IMG_ATOM>"],
        visual_indicator_token_ids=[TOKEN_IDS[mark] for mark in marks],
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
    )


def aya_vision() -> PreTrainedConfig:
    return tf.AyaVisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=tf.Cohere2Config(**TEXT, head_dim=16, logit_scale=0.25),
        image_token_index=TOKEN_IDS["<|IMG_PATCH|>"],
        downsample_factor=2,
    )


def llama4() -> PreTrainedConfig:
    vision = {
        "image_size": 56,
        "patch_size": 14,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "pixel_shuffle_ratio": 0.5,
        "intermediate_size": 128,
    }
    experts = {"intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1}
    return tf.Llama4Config(
        vision_config=VISION | vision,
        text_config=TEXT | {"head_dim": 16, "attention_chunk_size": 64} | experts,
        boi_token_index=TOKEN_IDS["<|image_start|>"],
        eoi_token_index=TOKEN_IDS["<|image_end|>"],
        image_token_index=TOKEN_IDS["<|patch|>"],
    )


def mllama() -> PreTrainedConfig:
    """Its image features enter by cross attention, not as positions of the sequence."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 96,  # of the output and two hidden states
        "image_size": 56,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 1],
    }
    text = TEXT | {
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default"},
    }
    return tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=TOKEN_IDS["<|image|>"])


VISION_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    make.__name__: make
    for make in (
        llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe,
        idefics2, idefics3, smolvlm, paligemma, paligemma2, gemma3, gemma3n, gemma4, gemma4_moe, gemma4_sharing,
        gemma4_audio, internvl, pixtral, mistral3, glm4v, glm4v_moe, kimi_k25, lfm2_vl, ovis2, aya_vision,
        llama4, mllama,
    )
}  # fmt: skip
TORCHVISION_FAMILIES = ("kimi_k25", "lfm2_vl", "llama4")  # transformers has no image processor without it
TIMM_FAMILIES = ("gemma3n",)  # the model needs timm

TEXT_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**TEXT),
    "qwen2": lambda: tf.Qwen2Config(**TEXT),
    "qwen3": lambda: tf.Qwen3Config(**TEXT, head_dim=16),
    "gemma": lambda: tf.GemmaConfig(**TEXT, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=32),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=32, layer_types=SLIDING),
    "mistral": lambda: tf.MistralConfig(**TEXT, head_dim=16, sliding_window=32),
    "phi3": lambda: tf.Phi3Config(**TEXT),
    "granite": lambda: tf.GraniteConfig(**TEXT, logits_scaling=8.0),
    "cohere2": lambda: tf.Cohere2Config(**TEXT, head_dim=16, logit_scale=0.25),
    "olmo2": lambda: tf.Olmo2Config(**TEXT),
    "smollm3": lambda: tf.SmolLM3Config(**TEXT),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=3, n_head=4, n_positions=512, **NAMED_IDS),
    "mixtral": lambda: tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**TEXT, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**TEXT, head_dim=16, **EXPERTS),
    "olmoe": lambda: tf.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: tf.GptOssConfig(**TEXT, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": deepseek_v3,
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **TEXT | {"num_hidden_layers": 4},
        **EXPERTS,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        shared_expert_intermediate_size=32,
    ),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=3,
        state_size=16,
        num_heads=8,
        head_dim=16,
        n_groups=2,
        chunk_size=32,
        **NAMED_IDS,
    ),
}
FAMILIES = VISION_FAMILIES | TEXT_FAMILIES

# --- processors ------------------------------------------------------------------------------------------------------

QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
GEMMA_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
AUDIO_TOKENS = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}


def tiny_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """One token per byte, and every family's special tokens; `named` are attributes such as `image_token`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **NAMED_TOKENS, **({"extra_special_tokens": named} if named else {})
    )


def chatml(image_text: str) -> str:
    return CHATML.replace(IMAGE_MARK, image_text)


def pixels(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _qwen(name: str) -> ProcessorMixin:
    patch_size = 14 if name.startswith("qwen2") else 16
    own = {"qwen2_vl": tf.Qwen2VLProcessor, "qwen2_5_vl": tf.Qwen2_5_VLProcessor}
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    video_type = "Qwen2VLVideoProcessor" if patch_size == 14 else "Qwen3VLVideoProcessor"
    return own.get(name, tf.Qwen3VLProcessor)(
        tf.Qwen2VLImageProcessorPil(size=size, patch_size=patch_size),
        tiny_tokenizer(**QWEN_TOKENS),
        VideoSettings({"video_processor_type": video_type, "patch_size": patch_size}),
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _glm4v(name: str) -> ProcessorMixin:
    tokens = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "begin_of_image_token": "<|begin_of_image|>",
        "end_of_image_token": "<|end_of_image|>",
    }
    return tf.Glm4vProcessor(
        tf.Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 2 * 28 * 28 * 64}),
        tiny_tokenizer(**tokens),
        VideoSettings({"video_processor_type": "Glm4vVideoProcessor"}),
        chat_template=chatml("<|begin_of_image|><|image|><|end_of_image|>"),
    )


def _llava(name: str) -> ProcessorMixin:
    return tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=pixels(56)),
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>"),
    )


def _llava_next(name: str) -> ProcessorMixin:
    return tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=pixels(56), image_grid_pinpoints=PINPOINTS
        ),
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>"),
    )


def _llava_onevision(name: str) -> ProcessorMixin:
    return tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessorPil(size=pixels(56), image_grid_pinpoints=PINPOINTS),
        tiny_tokenizer(),
        VideoSettings({"video_processor_type": "LlavaOnevisionVideoProcessor"}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )


def _idefics2(name: str) -> ProcessorMixin:
    return tf.Idefics2Processor(
        tf.Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False),
        tiny_tokenizer(),
        image_seq_len=4,
        chat_template=chatml("<image>"),
    )


def _idefics3(name: str) -> ProcessorMixin:
    return tf.Idefics3Processor(
        tf.Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tiny_tokenizer(),
        image_seq_len=4,
        chat_template=chatml("<image>"),
    )


def _smolvlm(name: str) -> ProcessorMixin:
    return processor_class("SmolVLMProcessor")(
        tf.SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tiny_tokenizer(),
        VideoSettings({"video_processor_type": "SmolVLMVideoProcessor"}),
        image_seq_len=4,
        chat_template=chatml("<image>"),
    )


def _paligemma(name: str) -> ProcessorMixin:
    """The family has no chat template."""
    images = tf.SiglipImageProcessorPil(size=pixels(56))
    images.image_seq_length = 16
    return tf.PaliGemmaProcessor(images, tiny_tokenizer(image_token="<image>"))


def _gemma3(name: str) -> ProcessorMixin:
    return tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size=pixels(112)),
        tiny_tokenizer(**GEMMA_TOKENS),
        image_seq_length=16,
        chat_template=chatml("<start_of_image>"),
    )


def _gemma3n(name: str) -> ProcessorMixin:
    return tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(),
        tf.SiglipImageProcessorPil(size=pixels(768)),
        tiny_tokenizer(**GEMMA_TOKENS, **AUDIO_TOKENS),
        chat_template=chatml("<image_soft_token>"),
    )


def _gemma4(name: str) -> ProcessorMixin:
    return tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(),
        tf.Gemma4ImageProcessorPil(max_soft_tokens=70),
        tiny_tokenizer(**GEMMA_TOKENS, **AUDIO_TOKENS),
        VideoSettings({"video_processor_type": "Gemma4VideoProcessor"}),
        image_seq_length=70,
        chat_template=chatml("<image_soft_token>"),
    )


def _internvl(name: str) -> ProcessorMixin:
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return tf.InternVLProcessor(
        tf.GotOcr2ImageProcessorPil(size=pixels(56), crop_to_patches=True, min_patches=1, max_patches=4),
        tiny_tokenizer(**tokens),
        VideoSettings({"video_processor_type": "InternVLVideoProcessor", "size": pixels(56)}),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>"),
    )


def _pixtral(name: str) -> ProcessorMixin:
    return processor_class("PixtralProcessor")(
        tf.PixtralImageProcessorPil(size={"longest_edge": 128}, patch_size=pixels(16)),
        tiny_tokenizer(),
        patch_size=16,
        spatial_merge_size=2 if name == "mistral3" else 1,
        chat_template=chatml("[IMG]"),
    )


def _ovis2(name: str) -> ProcessorMixin:
    return tf.Ovis2Processor(
        tf.Ovis2ImageProcessorPil(size=pixels(56), max_patches=4),
        tiny_tokenizer(),
        image_seq_length=4,
        chat_template=chatml("<image>"),
    )


def _aya_vision(name: str) -> ProcessorMixin:
    return tf.AyaVisionProcessor(
        tf.GotOcr2ImageProcessorPil(size=pixels(56), crop_to_patches=True, min_patches=1, max_patches=4),
        tiny_tokenizer(),
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=chatml("<image>"),
    )


def _mllama(name: str) -> ProcessorMixin:
    return tf.MllamaProcessor(
        tf.MllamaImageProcessorPil(size=pixels(56), max_image_tiles=4),
        tiny_tokenizer(),
        chat_template=chatml("<|image|>"),
    )


def _kimi_k25(name: str) -> ProcessorMixin:
    return tf.Kimi_K25Processor(
        tf.Kimi_K25ImageProcessor(size={"max_height": 112, "max_width": 112}),
        tiny_tokenizer(image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>"),
        tf.Kimi_K25VideoProcessor(),
        chat_template=chatml("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"),
    )


def _lfm2_vl(name: str) -> ProcessorMixin:
    tokens = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    images = tf.Lfm2VlImageProcessor(
        encoder_patch_size=16,
        tile_size=64,
        min_image_tokens=4,
        max_image_tokens=16,
        max_num_patches=64,
        do_image_splitting=False,
    )
    return tf.Lfm2VlProcessor(images, tiny_tokenizer(**tokens), chat_template=chatml("<image>"))


def _llama4(name: str) -> ProcessorMixin:
    return tf.Llama4Processor(
        tf.Llama4ImageProcessor(size=pixels(56), max_patches=4),
        tiny_tokenizer(),
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        chat_template=chatml("<|image|>"),
    )


PROCESSORS: dict[str, Callable[[str], ProcessorMixin]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "qwen3_5": _qwen,
    "qwen3_5_moe": _qwen,
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "paligemma2": _paligemma,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "gemma4_moe": _gemma4,
    "gemma4_sharing": _gemma4,
    "gemma4_audio": _gemma4,
    "internvl": _internvl,
    "pixtral": _pixtral,
    "mistral3": _pixtral,
    "ovis2": _ovis2,
    "aya_vision": _aya_vision,
    "mllama": _mllama,
    "kimi_k25": _kimi_k25,
    "lfm2_vl": _lfm2_vl,
    "llama4": _llama4,
}

# Those that tests train from the first to the last line of train.py, by the names under which people know them.
TRAINED = {
    "qwen3_5": "Qwen3.5",
    "qwen3_vl": "Qwen3-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "gemma4": "Gemma 4",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma 2",
    "mistral3": "Ministral 3, Mistral Small 3",
    "pixtral": "Pixtral",
    "smolvlm": "SmolVLM, SmolVLM2",
    "idefics3": "Idefics3",
    "internvl": "InternVL 3, InternVL 3.5",
    "llava": "LLaVA-1.5",
    "llava_onevision": "LLaVA-OneVision",
    "mllama": "Llama 3.2 Vision",
    "glm4v": "GLM-4.1V",
    "llama": "Llama (text alone)",
}

# --- folders ---------------------------------------------------------------------------------------------------------


def write_family(name: str, folder: Path, with_weights: bool = False) -> None:
    """Write a family's config, generation config and processor; for a text family its tokenizer.

    Without torchvision TORCHVISION_FAMILIES get a tokenizer and the names of their processor's classes.

    Args:
        with_weights: write random weights too, always the same ones.
    """
    config = FAMILIES[name]()
    if with_weights:
        build_tiny_model(config).save_pretrained(folder)
    config.save_pretrained(folder)
    special_ids = {key: value for key, value in NAMED_IDS.items() if key != "eos_token_id"}
    GenerationConfig(**special_ids, eos_token_id=END_TOKENS).save_pretrained(folder)
    if name in TEXT_FAMILIES:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder)
    elif name in TORCHVISION_FAMILIES and not is_torchvision_available():
        _write_class_names(name, folder)
    else:
        PROCESSORS[name](name).save_pretrained(folder)


def build_tiny_model(config: PreTrainedConfig) -> tf.PreTrainedModel:
    """The model of a config with random weights from SEED; the random numbers of the caller stay as they are."""
    has_images = type(config) in tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = tf.AutoModelForImageTextToText if has_images else tf.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = auto_class.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("attn_gate") or name.endswith("mlp_gate"):
            nn.init.ones_(parameter)  # Mllama's begin at 0, where nothing of an image gets through
    return model


def _write_class_names(name: str, folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    prefix = {"kimi_k25": "Kimi_K25", "lfm2_vl": "Lfm2Vl", "llama4": "Llama4"}[name]
    settings = {
        "processor_class": f"{prefix}Processor",
        "image_processor": {"image_processor_type": f"{prefix}ImageProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(chatml("<image>"))
