"""InternVL3.5."""

from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLProcessor, Qwen3Config

from models.presets.preset import Preset, byte_tokenizer, chat_template, square
from models.processors import VideoSettings


TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<img>": 151669,
    "</img>": 151670,
    "<IMG_CONTEXT>": 151671,
    "<video>": 151678,
}


def internvl3_5_2b() -> InternVLConfig:
    """The published files hold a head of its own beside the embedding, 2.35 billion parameters in all."""
    text_config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=TOKENS["<|im_end|>"],
        pad_token_id=TOKENS["<|endoftext|>"],
    )
    vision_config = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    return InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=TOKENS["<IMG_CONTEXT>"],
        image_seq_length=256,
        tie_word_embeddings=False,
    )


def processor() -> InternVLProcessor:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    template = chat_template(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        reply=("<|im_start|>assistant\n", "<|im_end|>"),
        image="<IMG_CONTEXT>\n",
        after="\n",
    )
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(
            size=square(448),
            crop_to_patches=True,
            min_patches=1,
            max_patches=12,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        byte_tokenizer(TOKENS, named, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        VideoSettings({"video_processor_type": "InternVLVideoProcessor"}),
        image_seq_length=256,
        chat_template=template,
    )


PRESETS = {"internvl3.5-2b": Preset(internvl3_5_2b, processor)}
