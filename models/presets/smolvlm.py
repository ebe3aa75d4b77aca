"""SmolVLM2."""

from transformers import LlamaConfig, ProcessorMixin, SmolVLMConfig, SmolVLMImageProcessorPil

from models.presets.preset import Preset, byte_tokenizer, chat_template
from models.processors import VideoSettings, processor_class


TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<global-img>": 49152}
TILES = ["_".join(("<row", str(row), "col", f"{column}>")) for row in range(1, 7) for column in range(1, 7)]
TOKENS |= {tile: 49153 + i for i, tile in enumerate(TILES)}
TOKENS |= {"<fake_token_around_image>": 49189, "<image>": 49190, "<end_of_utterance>": 49279}


def smolvlm2_2_2b() -> SmolVLMConfig:
    text_config = LlamaConfig(
        vocab_size=49280,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 130000.0},
        bos_token_id=1,
        eos_token_id=TOKENS["<end_of_utterance>"],
        pad_token_id=2,
    )
    vision_config = {
        "model_type": "smolvlm_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    }
    return SmolVLMConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=TOKENS["<image>"], scale_factor=3
    )


def processor() -> ProcessorMixin:
    template = chat_template(
        user=("User:", "<end_of_utterance>\n"),
        reply=("Assistant:", "<end_of_utterance>"),
        image="<image>",
        start="<|im_start|>",
        after="\n",
    )
    tokenizer = byte_tokenizer(
        TOKENS, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>"
    )
    return processor_class("SmolVLMProcessor")(
        SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
        tokenizer,
        VideoSettings({"video_processor_type": "SmolVLMVideoProcessor"}),
        image_seq_len=81,
        chat_template=template,
    )


PRESETS = {"smolvlm2-2.2b": Preset(smolvlm2_2_2b, processor)}
