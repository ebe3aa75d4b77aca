"""Train the tiny Qwen3-VL in data/tiny_qwen3_vl/, a second family for the demo. It is made as the tiny MGM is:

    python -m data.make_tiny_qwen3_vl --output NEW_DIR

Its class, image processor and chat template have the form of the real Qwen3-VL; only the sizes differ.
"""

import random
from dataclasses import dataclass

import torch
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from chat.encoding import encode
from chat.messages import to_messages
from data.demo import IMAGE_SIDE, draw_number
from data.make_tiny_mgm import (
    NO_DIGIT,
    PLACES,
    TinyConfig,
    init_narrow,
    optimize,
    patch_targets,
    place_conversations,
    random_scans,
    train_and_save,
    train_tokenizer,
)
from mgm.chat_templates import build_generation_config
from models.presets.qwen import TEMPLATE
from models.processors import VideoSettings
from utils import flag, run_script


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL_TOKENS += ("<|image_pad|>", "<|video_pad|>")
VOCAB_SIZE, HIDDEN_SIZE = 512, 128
PATCH_SIZE, MERGE_SIZE = 8, 2  # an image of 64 x 64 pixels takes 4 x 4 positions
GRID_SIZE = IMAGE_SIDE // (PATCH_SIZE * MERGE_SIZE)


@dataclass(kw_only=True)
class TinyQwenConfig(TinyConfig):
    output: str = flag("data/tiny_qwen3_vl", "new folder for the tiny model")


def main(config: TinyQwenConfig) -> dict:
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(VOCAB_SIZE, SPECIAL_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    video = VideoSettings({"video_processor_type": "Qwen3VLVideoProcessor"})
    processor = Qwen3VLProcessor(build_image_processor(), tokenizer, video, chat_template=TEMPLATE)
    return train_and_save(init_tiny_qwen(tokenizer), processor, config, train_vision, train_language)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Images keep their size: between one position and 16 x 16 of them."""
    cell = (PATCH_SIZE * MERGE_SIZE) ** 2
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=2,
        size={"shortest_edge": cell, "longest_edge": 256 * cell},
    )


def init_tiny_qwen(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN_SIZE,
            "num_position_embeddings": (IMAGE_SIDE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = build_generation_config(tokenizer)
    init_narrow(model)
    return model


def train_vision(model: Qwen3VLForConditionalGeneration, processor: ProcessorMixin, config: TinyConfig) -> None:
    """First the tower alone: a linear head, thrown away later, reads what lies on each position."""
    head = torch.nn.Linear(HIDDEN_SIZE, (NO_DIGIT + 1) * (len(PLACES) + 1))
    rng = random.Random(config.seed)

    def loss_of_batch() -> torch.Tensor:
        images, targets = [], []
        for _ in range(config.batch_size):
            scans = random_scans(rng)
            images.append(draw_number(scans, rng, distortion=2.0))
            targets += patch_targets([scan.label for scan in scans], GRID_SIZE)
        views = processor.image_processor(images, return_tensors="pt")
        features = model.get_image_features(views["pixel_values"], views["image_grid_thw"])
        logits = head(torch.cat(features.pooler_output))  # [N * P, classes]
        stacked = sum(torch.cat(layer).square().mean() for layer in features.deepstack_features)
        return torch.nn.functional.cross_entropy(logits, torch.tensor(targets)) + 0.01 * stacked

    vision = list(model.model.visual.parameters())
    optimize([*vision, *head.parameters()], loss_of_batch, config.vision_steps, config.learning_rate)


def train_language(model: Qwen3VLForConditionalGeneration, processor: ProcessorMixin, config: TinyConfig) -> None:
    """Then the whole model on conversations about places."""
    rng = random.Random(config.seed)

    def loss_of_batch() -> torch.Tensor:
        images, conversations = place_conversations(config.batch_size, rng)
        batch = encode(processor, [to_messages(turns) for turns in conversations], images)
        return model(**batch).loss

    optimize(list(model.parameters()), loss_of_batch, config.language_steps, config.learning_rate)


if __name__ == "__main__":
    run_script(main, TinyQwenConfig)
