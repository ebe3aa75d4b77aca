"""LLaVA-1.5."""

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from models.presets.preset import Preset, byte_tokenizer, chat_template, square


TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}


def llava_1_5_7b() -> LlavaConfig:
    vision_config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text_config = LlamaConfig(
        vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=TOKENS["<pad>"]
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=TOKENS["<image>"],
        image_seq_length=576,
    )


def processor() -> LlavaProcessor:
    """The published template has no </s>; the model was trained with one after each reply."""
    template = chat_template(user=("USER: ", " "), reply=("ASSISTANT: ", "</s>"), image="<image>\n", start="<s>")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square(336)),
        byte_tokenizer(TOKENS, **roles),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which is left out again
        chat_template=template,
    )


PRESETS = {"llava-1.5-7b": Preset(llava_1_5_7b, processor)}
