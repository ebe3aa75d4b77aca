"""MGM's released models, and a tiny one. The sizes are in mgm/configuration_mgm.py."""

from transformers import PreTrainedTokenizerFast

from mgm import PRESETS as CONFIGS
from mgm import MGMConfig, MGMProcessor
from mgm.processing_mgm import IMAGE_TOKEN, build_processor
from models.presets.preset import Preset, byte_tokenizer


GEMMA = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}
VICUNA = {"<unk>": 0, "<s>": 1, "</s>": 2}
LLAMA_3 = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
}
QWEN2 = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


def mgm(name: str) -> Preset:
    return Preset(CONFIGS[name], lambda: processor_for(CONFIGS[name]()))


def processor_for(config: MGMConfig) -> MGMProcessor:
    return build_processor(config, tokenizer_for(config))


def tokenizer_for(config: MGMConfig) -> PreTrainedTokenizerFast:
    """The special tokens of the language model that a released model has."""
    image = {IMAGE_TOKEN: config.image_token_id}
    text_config = config.text_config
    match text_config.model_type:
        case "gemma":
            return byte_tokenizer(
                GEMMA | image, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
            )
        case "qwen2":
            return byte_tokenizer(QWEN2 | image, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if text_config.vocab_size == 128256:
        return byte_tokenizer(LLAMA_3 | image, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return byte_tokenizer(VICUNA | image, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


PRESETS = {name: mgm(name) for name in CONFIGS}
