"""The committed tiny model against its promises."""

import random
from pathlib import Path

import pytest
import torch

from data.demo import DEMO_QUESTIONS
from data.make_tiny_mgm import SPECIAL_TOKENS, place_accuracy, place_questions
from models.loading import load_model, load_processor


TINY_MGM = Path(__file__).parent.parent / "data/tiny_mgm"


def test_the_tiny_model_was_never_asked_the_demos_questions():
    rng = random.Random(0)
    asked = {question for _ in range(500) for question, _ in place_questions(rng.choices(range(10), k=3), rng)}
    assert not asked & {question for question, _ in DEMO_QUESTIONS.values()}


@pytest.mark.parametrize("text", ["The 123 digits!", " two  spaces\n", "naïve 数字 🙂", "<image", "a\tb\r\n"])
def test_tokenizer_gives_any_text_back(text):
    tokenizer = load_processor(str(TINY_MGM)).tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokenizer_takes_digits_one_by_one():
    tokenizer = load_processor(str(TINY_MGM)).tokenizer
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]


def test_tiny_model_is_small_and_loads():
    assert sum(path.stat().st_size for path in TINY_MGM.iterdir()) <= 5_000_000
    model = load_model(str(TINY_MGM), torch.float32, "sdpa")
    processor = load_processor(str(TINY_MGM))
    assert model.config.image_token_id == processor.image_token_id == model.config.text_config.vocab_size
    assert set(model.generation_config.eos_token_id) == {1, 5}


def test_tiny_model_knows_digits_by_their_place():
    """On 20 images of held-out scans; over 200 images its training ended at 92 %."""
    model = load_model(str(TINY_MGM), torch.float32, "sdpa").eval()
    assert place_accuracy(model, load_processor(str(TINY_MGM)), num_images=20) > 0.8
