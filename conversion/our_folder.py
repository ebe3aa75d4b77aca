"""Write a folder that transformers loads: weights, config, generation config and processor."""

from pathlib import Path

from transformers import AutoTokenizer, CLIPImageProcessorPil, GenerationConfig, PreTrainedTokenizerBase

from chat_templates import END_OF_TURN_TOKENS, chat_template_for
from configuration_mgm import MGMConfig
from conversion.original_files import keep_original_files
from conversion.shards import Shard, all_tensors, check_names, embeddings_dtype, new_folder, write_shards
from modeling_mgm import MGMForConditionalGeneration
from processing_mgm import MGMProcessor
from utils import UserError


def write_our_folder(output: Path, config: MGMConfig, shards: list[Shard], source: Path, aspect_ratio: str) -> dict:
    """Write the folder, with `source`'s tokenizer. Returns the index of the weights."""
    check_names(config, all_tensors(shards))
    with new_folder(output) as partial:
        keep_original_files(source, partial)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{source}: its tokenizer cannot be loaded ({error})") from None
        processor = build_processor(config, tokenizer, aspect_ratio)
        config.image_token_id = processor.image_token_id
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.dtype = embeddings_dtype(all_tensors(shards))
        config.architectures = [MGMForConditionalGeneration.__name__]
        for part in (config, build_generation_config(tokenizer), processor):
            part.save_pretrained(partial)
        return write_shards(shards, partial)


def build_processor(
    config: MGMConfig, tokenizer: PreTrainedTokenizerBase, image_aspect_ratio: str = "pad"
) -> MGMProcessor:
    """The processor for a model: CLIP's preprocessing at the auxiliary tower's size."""
    side = config.vision_config_aux.image_size
    return MGMProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        chat_template=chat_template_for(tokenizer, config.text_config.model_type),
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_aspect_ratio=image_aspect_ratio,
        image_grid=config.image_grid,
        image_global=config.image_global,
    )


def build_generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A reply ends with <eos> or with the end of a turn (<end_of_turn> or what the tokenizer has for it)."""
    vocabulary = tokenizer.get_vocab()
    end_of_turn = [vocabulary[token] for token in END_OF_TURN_TOKENS if token in vocabulary]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys([tokenizer.eos_token_id, *end_of_turn])),
        pad_token_id=tokenizer.pad_token_id,
    )
