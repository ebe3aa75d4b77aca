"""What train.py asks before and after training: which questions, how long answers may be, and what comes back."""

import pytest
import torch

from data.dataset import open_dataset
from data.demo import ensure_demo
from evaluation.held_out import HeldOut, evaluate, exact_match
from models.generation import prompt_inputs
from models.loading import load_model, load_processor
from utils import UserError


MODEL = "data/tiny_mgm"


def test_evaluate_for_training(accelerator):
    """What train.py calls: a prediction a sample, and the model's mode as it was."""
    dataset = open_dataset(ensure_demo() / "validation.json")
    dataset.records = dataset.records.select(range(6))
    model = load_model(MODEL, torch.float32, "sdpa").train()
    processor = load_processor(MODEL)
    held_out = HeldOut.of(dataset, processor, batch_size=4)
    predictions = evaluate(accelerator, model, processor, held_out)
    assert model.training
    assert [prediction.index for prediction in predictions] == list(range(6))
    assert [prediction.id for prediction in predictions] == dataset.records["id"][:6]
    assert exact_match(predictions) == sum(p.is_exact for p in predictions) / 6


def test_nothing_held_out(accelerator, capfd):
    """No progress bar of nothing."""
    held_out = HeldOut.of(None, load_processor(MODEL), batch_size=4)
    assert evaluate(accelerator, torch.nn.Linear(1, 1), load_processor(MODEL), held_out) == []
    assert "Answering" not in capfd.readouterr().err


def test_held_out_sizes(mixed_dataset):
    """The longest row is the longest prompt and as many tokens as the longest reply has; a flag may say fewer."""
    dataset, processor = open_dataset(mixed_dataset, "data/demo"), load_processor(MODEL)
    held_out = HeldOut.of(dataset, processor, batch_size=3)
    prompts, replies = [], []
    for question in held_out.questions:
        images = question.images()
        assert len(images) == question.num_images
        inputs = prompt_inputs(processor, [question.conversation], [images])
        prompts.append(inputs["input_ids"].shape[1])
        replies.append(len(processor.tokenizer(question.references[0], add_special_tokens=False)["input_ids"]))
    assert held_out.max_new_tokens >= max(replies) + 1, "a perfect answer and what ends it"
    assert held_out.longest.num_tokens == max(prompts) + held_out.max_new_tokens
    assert held_out.longest.num_images == max(question.num_images for question in held_out.questions)
    assert HeldOut.of(dataset, processor, 3, max_new_tokens=2).longest.num_tokens == max(prompts) + 2
    assert HeldOut.of(None, processor, 3).questions == []
    room = max(prompts) + held_out.max_new_tokens - 1
    assert HeldOut.of(dataset, processor, 3, positions=room).longest.num_tokens == room, "a reply that is cut"
    with pytest.raises(UserError, match=f"--max_new_tokens 9: the longest held-out prompt has {max(prompts)} tokens"):
        HeldOut.of(dataset, processor, 3, max_new_tokens=9, positions=max(prompts) + 8)
    with pytest.raises(UserError, match="the held-out data: the longest held-out prompt"):
        HeldOut.of(dataset, processor, 3, positions=max(prompts))


def test_long_answers_are_not_cut(accelerator, tiny_model):
    """As many tokens as the longest reply has: 50 digits. Where a flag allows fewer, answers are said to be cut."""
    dataset, processor = open_dataset(ensure_demo() / "validation.json"), load_processor(MODEL)
    reply = "7" * 50
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": reply}]
    dataset.records = dataset.records.select(range(2)).map(lambda record: {"conversations": turns, "images": []})
    model = load_model(MODEL, torch.float32, "sdpa").eval()
    tokens = iter(2 * [*processor.tokenizer(reply, add_special_tokens=False)["input_ids"], 1])

    def dictated(module, args, output):
        output = torch.full_like(output, -100.0)
        output[..., next(tokens)] = 100.0
        return output

    model.lm_head.register_forward_hook(dictated)
    (first, second) = evaluate(accelerator, model, processor, HeldOut.of(dataset, processor, batch_size=2))
    assert first.prediction == second.prediction == reply and first.is_exact and not first.is_cut
    (cut, _) = evaluate(accelerator, model, processor, HeldOut.of(dataset, processor, 2, max_new_tokens=32))
    assert cut.is_cut and not cut.is_exact
