"""Train the tiny MGM in data/tiny_mgm/: it cannot answer the demo's questions until it is fine-tuned.

    python -m data.make_tiny_mgm --output NEW_DIR

It learns to tell digits by their place, to count and to compare two of them; numbers, their parity, their largest
digit and sums are left for the demo. A scan that validates the demo is not trained on here either.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, get_cosine_schedule_with_warmup

from data.demo import DEMO_QUESTIONS, DIGIT_SIDE, IMAGE_SIDE, Scan, choose_scans, draw_number, load_digits, load_scans
from mgm.chat_templates import build_generation_config
from mgm.configuration_mgm import tiny
from mgm.modeling_mgm import MGMForConditionalGeneration
from mgm.processing_mgm import MGMProcessor, build_processor
from models.generation import generate_answers, prompt_inputs
from utils import UserError, check_minimum, flag, run_script


PLACES = ("first", "second", "third")
NO_DIGIT = 10  # the class of a patch of bare paper
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")  # Gemma's, ids 0 to 5

NAMED_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}


def place_questions(digits: list[int], rng: random.Random) -> Iterator[tuple[str, str]]:
    """What the tiny model is trained on: (question, answer) about single digits, their places and their order."""
    for place, digit in zip(PLACES, digits, strict=False):
        yield f"What is the {place} digit?", str(digit)
    yield "What is the last digit?", str(digits[-1])
    yield "How many digits?", str(len(digits))
    present = rng.randint(0, 9) if rng.random() < 0.5 else rng.choice(digits)
    yield f"Is there a {present}?", "yes" if present in digits else "no"
    i = rng.randrange(len(digits))
    yield f"What comes after the {PLACES[i]} digit?", str((digits[i] + 1) % 10)
    place, digit = rng.choice([("last", digits[-1]), *zip(PLACES, digits, strict=False)])
    yield f"Is the {place} digit even?", "no" if digit % 2 else "yes"
    if len(digits) > 1:
        i, j = rng.sample(range(len(digits)), 2)
        word, choose = rng.choice([("larger", max), ("smaller", min)])
        yield f"Which is {word}, the {PLACES[i]} or the {PLACES[j]}?", str(choose(digits[i], digits[j]))


@dataclass(kw_only=True)
class TinyConfig:
    output: str = flag("data/tiny_mgm", "new folder for the tiny model")
    vision_steps: int = flag(2500, "optimizer steps of the vision side alone")
    language_steps: int = flag(2100, "optimizer steps of the whole model")
    batch_size: int = flag(32, "images a step")
    learning_rate: float = flag(2e-3, "the highest learning rate, at the end of the warm-up")
    seed: int = flag(0, "for the first weights and the order of the images")

    def __post_init__(self) -> None:
        check_minimum(self, vision_steps=1, language_steps=1, batch_size=1)
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists: choose a new folder")


def main(config: TinyConfig) -> dict:
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(tiny().text_config.vocab_size, **NAMED_TOKENS)
    model = init_tiny_mgm(tokenizer)
    processor = build_processor(model.config, tokenizer)
    return train_and_save(model, processor, config, train_vision, train_language)


def train_and_save(
    model: PreTrainedModel, processor: ProcessorMixin, config: TinyConfig, *stages: Callable[..., None]
) -> dict:
    """Run each stage of the training, write the model, and say how well it has learned."""
    model.train()
    for train in stages:
        train(model, processor, config)
    model.eval()
    accuracy = place_accuracy(model, processor)
    model.save_pretrained(config.output)
    processor.save_pretrained(config.output)
    return {"status": "done", "output": config.output, "place_accuracy": accuracy}


def train_tokenizer(
    vocab_size: int, special_tokens: tuple[str, ...] = SPECIAL_TOKENS, **named: str
) -> PreTrainedTokenizerFast:
    """A small tokenizer: BPE that falls back to bytes, spaces as "▁", each digit a token.

    `named` says which special tokens are `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    """
    questions = [question for question, _ in DEMO_QUESTIONS.values()]
    questions += [question for question, _ in place_questions([1, 2, 3], random.Random(0))]
    corpus = 50 * [*questions, "user", "model", "yes", "no", "even", "odd", *PLACES] + [load_digits().DESCR]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]

    # Merges within words are learned on their own, then put behind Gemma's special tokens and the bytes.
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    alphabet = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens) - len(byte_tokens), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    learned = json.loads(trained.to_str())["model"]
    words = [*special_tokens, *byte_tokens, *sorted(learned["vocab"], key=learned["vocab"].get)]

    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=named.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        additional_special_tokens=[token for token in special_tokens if token not in named.values()],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def init_tiny_mgm(tokenizer: PreTrainedTokenizerFast) -> MGMForConditionalGeneration:
    """The preset `tiny` with random weights, made ready for training from nothing."""
    config = tiny()
    config.image_token_id = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = MGMForConditionalGeneration(config)
    model.generation_config = build_generation_config(tokenizer)
    init_narrow(model)
    return model


def init_narrow(model: nn.Module) -> None:
    """First weights that learn from nothing: transformers' std of 0.02 is for wide layers."""
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale_parameter"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def train_vision(model: MGMForConditionalGeneration, processor: MGMProcessor, config: TinyConfig) -> None:
    """First the towers, mining and projector alone: a linear head, thrown away later, reads what lies on each patch.

    As in the real model, whose towers come trained: a language model that learns from random features hardly starts.
    """
    head = torch.nn.Linear(model.config.text_config.hidden_size, (NO_DIGIT + 1) * (len(PLACES) + 1))
    vision = [parameter for name, parameter in model.named_parameters() if "language_model" not in name]
    rng = random.Random(config.seed)

    def loss_of_batch() -> torch.Tensor:
        views, targets = [], []
        for _ in range(config.batch_size):
            scans = random_scans(rng)
            views.append(processor.image_views(draw_number(scans, rng, distortion=2.0)))
            targets.append(patch_targets([scan.label for scan in scans], model.config.patch_grid_size))
        low, high = (torch.stack(images) for images in zip(*views, strict=True))
        logits = head(model.model.get_image_features(low, high))  # [N, P, classes]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())

    optimize([*vision, *head.parameters()], loss_of_batch, config.vision_steps, config.learning_rate)


def patch_targets(digits: list[int], grid_size: int) -> list[int]:
    """For every patch a class that tells which digit, if any, lies under its middle, and at which place."""
    left, top = (IMAGE_SIDE - DIGIT_SIDE * len(digits)) / 2, (IMAGE_SIDE - DIGIT_SIDE) / 2
    targets = []
    for row in range(grid_size):
        for column in range(grid_size):
            x, y = (column + 0.5) * IMAGE_SIDE / grid_size, (row + 0.5) * IMAGE_SIDE / grid_size
            place = int((x - left) // DIGIT_SIDE)
            is_on_digit = 0 <= place < len(digits) and top <= y < top + DIGIT_SIDE
            place = place if is_on_digit else len(PLACES)
            targets.append(place * (NO_DIGIT + 1) + (digits[place] if is_on_digit else NO_DIGIT))
    return targets


def random_scans(rng: random.Random) -> list[Scan]:
    """Training scans of one to three digits, more often of several."""
    return choose_scans(load_scans("train"), rng.choice((1, 2, 2, 3, 3, 3)), rng)


def train_language(model: MGMForConditionalGeneration, processor: MGMProcessor, config: TinyConfig) -> None:
    """Then the whole model on conversations about places."""
    rng = random.Random(config.seed)
    optimize(
        list(model.parameters()),
        lambda: model(**place_batch(processor, config.batch_size, rng)).loss,
        config.language_steps,
        config.learning_rate,
    )


def optimize(
    parameters: list[torch.nn.Parameter], loss_of_batch: Callable[[], torch.Tensor], steps: int, learning_rate: float
) -> None:
    """AdamW in fp32 with a cosine schedule; prints the loss now and then."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def place_batch(processor: MGMProcessor, batch_size: int, rng: random.Random) -> dict[str, torch.Tensor]:
    images, conversations = place_conversations(batch_size, rng)
    return processor(conversations=conversations, images=images)


def place_conversations(
    batch_size: int, rng: random.Random
) -> tuple[list[list[Image.Image]], list[list[dict[str, str]]]]:
    """Distorted images of training scans, each with a conversation of several questions in any order."""
    images, conversations = [], []
    for _ in range(batch_size):
        scans = random_scans(rng)
        questions = list(place_questions([scan.label for scan in scans], rng))
        rng.shuffle(questions)
        images.append([draw_number(scans, rng, distortion=2.0)])
        conversations.append(to_conversation(questions[:5]))
    return images, conversations


def to_conversation(questions: list[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA turns; the image comes with the first question."""
    turns = []
    for question, answer in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0] = {"from": "human", "value": f"<image>\n{turns[0]['value']}"}
    return turns


def place_accuracy(model: PreTrainedModel, processor: ProcessorMixin, num_images: int = 200) -> float:
    """Share of single questions about held-out scans that are answered exactly, greedily."""
    rng = random.Random(1)
    correct = total = 0
    for _ in range(num_images):
        scans = choose_scans(load_scans("validation"), rng.randint(1, 3), rng)
        image = draw_number(scans, rng)
        questions = list(place_questions([scan.label for scan in scans], rng))
        conversations = [to_conversation([(question, "")])[:1] for question, _ in questions]
        images = [[image]] * len(questions)
        inputs = prompt_inputs(processor, conversations, images)
        replies = generate_answers(model, processor, inputs, max_new_tokens=6)
        correct += sum(reply.text.strip() == answer for reply, (_, answer) in zip(replies, questions, strict=True))
        total += len(questions)
    return correct / total


if __name__ == "__main__":
    run_script(main, TinyConfig)
