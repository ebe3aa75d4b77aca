"""Answers in batches are those to each question alone, and a worker without room says so."""

import json

import pytest
import torch
from PIL import Image
from test_encoding import processor_of

from data.dataset import open_dataset
from data.sizes import with_image_sizes
from evaluation.answer import QuestionBatches, answer_batches
from evaluation.held_out import HeldOut, num_tokens
from evaluation.tasks import conversations
from evaluation.tasks.task import Question
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


def test_smaller_images_and_dummy_ones():
    """--max_image_pixels holds for questions too; a batch without images gets one about a blank image, at its end."""
    qwen = processor_of("qwen2_5_vl")
    photo = Question("0", "What?", ["It."], images=lambda: [Image.new("RGB", (640, 480))])
    text = Question("1", "Why?", ["So."], images=list, num_images=0)
    questions, batches = [photo, text], [[0], [1], [0, 1]]
    whole, small = (QuestionBatches(qwen, questions, batches, pixels)[0] for pixels in (0, 10_000))
    assert small["pixel_values"].shape[0] == 48 < whole["pixel_values"].shape[0], "112 x 84 pixels in patches of 14"
    plain, dummy = (QuestionBatches(qwen, questions, batches, 0, dummy_images)[1] for dummy_images in (False, True))
    assert "pixel_values" not in plain and dummy["input_ids"].shape[0] == 2
    length = plain["input_ids"].shape[1]
    assert dummy["input_ids"][0, -length:].tolist() == plain["input_ids"][0].tolist()
    assert QuestionBatches(qwen, questions, batches, 0, True)[2]["input_ids"].shape[0] == 2


def test_a_question_keeps_its_turns(tmp_path):
    """A system turn, images between texts; what comes after the first reply is left out."""
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Before <image>\nand after <image>: what?"},
        {"from": "gpt", "value": "A cup."},
        {"from": "human", "value": "<image>\nAnd now?"},
        {"from": "gpt", "value": "None."},
    ]
    for i in range(3):
        Image.new("RGB", (28 * (i + 2), 56)).save(tmp_path / f"{i}.png")
    record = {"id": "0", "image": [f"{i}.png" for i in range(3)], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    dataset = open_dataset(tmp_path / "data.json")
    dataset.records = with_image_sizes(dataset)
    (question,) = conversations.to_questions(dataset)
    assert question.conversation == turns[:2] and question.references == ["A cup."] and question.num_images == 2
    assert [image.size for image in question.images()] == question.image_sizes == [(56, 56), (84, 56)]
    qwen = processor_of("qwen2_5_vl")
    inputs = prompt_inputs(qwen, [question.conversation], [question.images()])
    assert num_tokens(qwen, question)[0] == inputs["input_ids"].shape[1]
    held_out = HeldOut.of(dataset, qwen, batch_size=1)
    assert held_out.longest.num_images == 2 and held_out.longest.image_size == (84, 56)
