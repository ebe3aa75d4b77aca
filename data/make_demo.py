"""The demo: questions about handwritten numbers, and the tiny MGM that cannot answer them until it is fine-tuned.

    python -m data.make_demo                                    # writes data/demo/, as train.py does on first use
    python -m data.make_demo --train_tiny_mgm --output NEW_DIR  # trains what lies in data/tiny_mgm/

Images are put together from the 1797 8x8 scans of scikit-learn's digits (UCI's optical recognition of handwritten
digits). A scan belongs either to training or to validation, for the demo and for the tiny model alike. The tiny model
learns to tell digits by their place, to count and to compare two of them; whole numbers, their parity, their largest
digit and sums are left for the demo.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from configuration_mgm import tiny
from conversion.our_folder import build_generation_config, build_processor
from generation import generate_answers, prompt_inputs
from modeling_mgm import MGMForConditionalGeneration
from processing_mgm import MGMProcessor
from utils import UserError, check_minimum, run_script


DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_VERSION = 5  # raise it when the files change: older ones are then replaced
NUM_IMAGES = {"train": 8000, "validation": 200}
NUM_VALIDATION_SCANS = 297
IMAGE_SIDE, DIGIT_SIDE = 64, 20  # pixels

DEMO_QUESTIONS: dict[str, tuple[str, Callable[[list[int]], str]]] = {
    "number": ("What is the number?", lambda digits: "".join(map(str, digits))),
    "parity": ("Is it even or odd?", lambda digits: "odd" if digits[-1] % 2 else "even"),
    "sum": ("What is the sum of the digits?", lambda digits: str(sum(digits))),
    "largest": ("What is the largest digit?", lambda digits: str(max(digits))),
}
# Images from one question of a type to the next. The last two are hard for a model this small: most weight is on the
# first two, which it can learn in minutes.
ASKED_EVERY = {"number": 1, "parity": 1, "largest": 4, "sum": 8}
PLACES = ("first", "second", "third")
NO_DIGIT = 10  # the class of a patch of bare paper
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")  # Gemma's, ids 0 to 5


@dataclass(frozen=True)
class Scan:
    """One handwritten digit: `index` in scikit-learn's data, the grey image and what it shows."""

    index: int
    image: Image.Image
    label: int


def load_digits():
    """scikit-learn's Bunch. Imported late: whoever brings a data set of their own does not wait for scikit-learn."""
    from sklearn import datasets

    return datasets.load_digits()


@cache
def load_scans(split: str) -> dict[int, list[Scan]]:
    """The scans of `train` or `validation`, by digit."""
    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    chosen = order[:NUM_VALIDATION_SCANS] if split == "validation" else order[NUM_VALIDATION_SCANS:]
    scans = {label: [] for label in range(10)}
    for index in chosen:
        pixels = (digits.images[index] * (255 / 16)).astype("uint8")
        scans[digits.target[index]].append(Scan(index, Image.fromarray(pixels), int(digits.target[index])))
    return scans


def draw_number(scans: list[Scan], rng: random.Random, distortion: float = 1.0) -> Image.Image:
    """The scans side by side in the middle of a page, dark ink on pale paper, each slightly turned and shifted."""
    paper = tuple(rng.randint(215, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 70) for _ in range(3))
    page = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), paper)
    left = (IMAGE_SIDE - DIGIT_SIDE * len(scans)) / 2
    for place, scan in enumerate(scans):
        side = round(DIGIT_SIDE * (1 + distortion * rng.uniform(-0.08, 0.08)))
        mask = scan.image.resize((side, side), Image.Resampling.BICUBIC)
        mask = mask.rotate(distortion * rng.uniform(-6, 6), Image.Resampling.BILINEAR)
        centre = (DIGIT_SIDE - side) / 2
        x = left + DIGIT_SIDE * place + centre + distortion * rng.uniform(-1, 1)
        y = (IMAGE_SIDE - side) / 2 + distortion * rng.uniform(-1.5, 1.5)
        page.paste(ink, (round(x), round(y)), mask)
    return page


def choose_scans(scans: dict[int, list[Scan]], num_digits: int, rng: random.Random) -> list[Scan]:
    """Scans for a number in which every digit is as likely; no number of several digits begins with 0."""
    first = 1 if num_digits > 1 else 0
    return [rng.choice(scans[rng.randint(0 if place else first, 9)]) for place in range(num_digits)]


def ensure_demo(folder: Path | str = DEMO_FOLDER) -> Path:
    """Write the demo unless it is there already: `train.json`, `validation.json` (LLaVA's form), `images/`.

    Takes a few seconds. Any number of processes may call it at once: each writes beside the folder, and the first to
    be ready gives its work the folder's name.
    """
    folder = Path(folder)
    if _is_current(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_demo(partial)
        if folder.exists() and not _is_current(folder):
            folder.rename(partial / "outdated")
            shutil.rmtree(partial / "outdated")
        partial.rename(folder)
    except OSError:
        if not _is_current(folder):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_current(folder: Path) -> bool:
    version = folder / "version.txt"
    return version.is_file() and version.read_text() == str(DEMO_VERSION)


def write_demo(folder: Path) -> None:
    (folder / "images").mkdir()
    folder.chmod(0o755)  # mkdtemp's is private
    for split, num_images in NUM_IMAGES.items():
        rng = random.Random(split)
        samples = []
        for i in range(num_images):
            scans = choose_scans(load_scans(split), rng.choice((2, 2, 3)), rng)
            image = f"images/{split}-{i:05}.png"
            draw_number(scans, rng).save(folder / image, compress_level=1)
            questions = {name for name, every in ASKED_EVERY.items() if i % every == 0}
            samples += demo_samples(f"{split}-{i:05}", image, [scan.label for scan in scans], questions)
        (folder / f"{split}.json").write_text(json.dumps(samples, indent=1))
    (folder / "version.txt").write_text(str(DEMO_VERSION))


def demo_samples(name: str, image: str, digits: list[int], question_types: Set[str]) -> list[dict]:
    """One LLaVA sample a question; the question's type ends the id: `validation-00012-sum`."""
    return [
        {
            "id": f"{name}-{question_type}",
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer(digits)},
            ],
        }
        for question_type, (question, answer) in DEMO_QUESTIONS.items()
        if question_type in question_types
    ]


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
class DemoConfig:
    train_tiny_mgm: bool = field(default=False, metadata={"help": "train the tiny model instead of writing the demo"})
    output: str = field(default="data/tiny_mgm", metadata={"help": "new folder for the tiny model"})
    vision_steps: int = field(default=2500, metadata={"help": "optimizer steps of the vision side alone"})
    language_steps: int = field(default=2100, metadata={"help": "optimizer steps of the whole model"})
    batch_size: int = field(default=32, metadata={"help": "images a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "the highest, after warm-up"})
    seed: int = 0

    def __post_init__(self) -> None:
        check_minimum(self, vision_steps=1, language_steps=1, batch_size=1)
        if self.train_tiny_mgm and Path(self.output).exists():
            raise UserError(f"--output {self.output} exists: choose a new folder")


def main(config: DemoConfig) -> dict:
    if not config.train_tiny_mgm:
        return {"status": "done", "demo": str(ensure_demo())}
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(tiny().text_config.vocab_size)
    model = init_tiny_mgm(tokenizer)
    processor = build_processor(model.config, tokenizer)
    model.train()
    train_vision(model, processor, config)
    train_language(model, processor, config)
    model.eval()
    accuracy = place_accuracy(model, processor)
    model.save_pretrained(config.output)
    processor.save_pretrained(config.output)
    return {"status": "done", "output": config.output, "place_accuracy": accuracy}


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A small tokenizer of Gemma's kind: BPE that falls back to bytes, spaces as "▁", each digit a token."""
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
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(byte_tokens), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    learned = json.loads(trained.to_str())["model"]
    words = [*SPECIAL_TOKENS, *byte_tokens, *sorted(learned["vocab"], key=learned["vocab"].get)]

    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
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
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale_parameter"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim > 1 and "embed" not in name:  # transformers' std of 0.02 is for wide layers
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def train_vision(model: MGMForConditionalGeneration, processor: MGMProcessor, config: DemoConfig) -> None:
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


def train_language(model: MGMForConditionalGeneration, processor: MGMProcessor, config: DemoConfig) -> None:
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
    """Distorted images of training scans, each with a conversation of several questions in any order."""
    images, conversations = [], []
    for _ in range(batch_size):
        scans = random_scans(rng)
        questions = list(place_questions([scan.label for scan in scans], rng))
        rng.shuffle(questions)
        images.append([draw_number(scans, rng, distortion=2.0)])
        conversations.append(to_conversation(questions[:5]))
    return processor(conversations=conversations, images=images)


def to_conversation(questions: list[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA turns; the image comes with the first question."""
    turns = []
    for question, answer in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0] = {"from": "human", "value": f"<image>\n{turns[0]['value']}"}
    return turns


def place_accuracy(model: MGMForConditionalGeneration, processor: MGMProcessor, num_images: int = 200) -> float:
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
    run_script(main, DemoConfig)
