"""Write a folder that transformers loads: weights, config, generation config and processor."""

from pathlib import Path

from transformers import AutoTokenizer

from conversion.original_files import keep_original_files
from conversion.shards import Shard, all_tensors, check_names, embeddings_dtype, new_folder, write_shards
from mgm.chat_templates import build_generation_config
from mgm.configuration_mgm import MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from mgm.processing_mgm import build_processor
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
