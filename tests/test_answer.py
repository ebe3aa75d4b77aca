"""Answers in batches are those to each question alone, and a worker without room says so."""

import pytest
import torch

from evaluation.answer import answer_batches
from evaluation.tasks import conversations
from models.generation import Answer, prompt_inputs
from models.loading import load_model, load_processor
from utils import UserError


MODEL = "data/tiny_mgm"


def greedy(model, processor, question, max_new_tokens: int) -> Answer:
    """One token after another, without cache, padding or generate."""
    is_cut = True
    images = question.images()
    inputs = prompt_inputs(processor, [question.conversation], [images])
    end, tokens = model.generation_config.eos_token_id, []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(**inputs).logits[0, -1].argmax()
        tokens.append(token)
        if int(token) in end:
            is_cut = False
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return Answer(processor.decode(tokens, skip_special_tokens=True), is_cut)


def test_batches_answer_as_one_by_one(mixed_dataset, accelerator):
    """Padded batches with a cache, of several sizes, against a loop that has neither (fp32)."""
    model, processor = load_model(MODEL, torch.float32, "sdpa").eval(), load_processor(MODEL)
    questions = conversations.load(str(mixed_dataset), "data/demo").questions
    expected = {i: greedy(model, processor, question, 12) for i, question in enumerate(questions)}
    assert len({answer.text for answer in expected.values()}) > 3
    indices = list(range(len(questions)))
    for batch_size in (1, 5, 24):
        found = {}
        for batch in answer_batches(accelerator, model, processor, questions, indices, batch_size, 12):
            assert not found.keys() & batch.keys()
            found |= batch
        assert found == expected, batch_size


def test_shared_memory_that_fills_up(mixed_dataset, accelerator, monkeypatch):
    """A worker whose batch finds no room says so; the run does not wait for it forever."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    model, processor = load_model(MODEL, torch.float32, "sdpa").eval(), load_processor(MODEL)
    questions = conversations.load(str(mixed_dataset), "data/demo").questions
    with pytest.raises(UserError, match="shared memory is full .* or choose --dataloader_num_workers 0"):
        next(answer_batches(accelerator, model, processor, questions, [0, 1], 2, 4, num_workers=1))
