"""Ministral 3: Pixtral's image encoder and Mistral's language model."""

from transformers import Mistral3Config, PixtralImageProcessorPil, ProcessorMixin

from models.presets.preset import Preset, byte_tokenizer, chat_template, square
from models.processors import processor_class


TOKENS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "[INST]": 3,
    "[/INST]": 4,
    "[IMG]": 10,
    "<pad>": 11,
    "[IMG_BREAK]": 12,
    "[IMG_END]": 13,
    "[SYSTEM_PROMPT]": 17,
    "[/SYSTEM_PROMPT]": 18,
}


def ministral3_3b() -> Mistral3Config:
    return Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": 131072,
            "hidden_size": 3072,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": TOKENS["<pad>"],
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
        image_token_index=TOKENS["[IMG]"],
        spatial_merge_size=2,
        tie_word_embeddings=True,
    )


def processor() -> ProcessorMixin:
    template = chat_template(user=("[INST]", "[/INST]"), reply=("", "</s>"), image="[IMG]", start="<s>")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return processor_class("PixtralProcessor")(
        PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size=square(14)),
        byte_tokenizer(TOKENS, **roles),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template,
    )


PRESETS = {"ministral-3-3b": Preset(ministral3_3b, processor)}
