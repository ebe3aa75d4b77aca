"""MMBench (arXiv:2307.06281): multiple choice, the images inside the TSV file as base64.

An answer is matched to an option by VLMEvalKit's rules (vlmeval/utils/matching_util.py, `can_infer`, and "exact
matching" in vlmeval/dataset/utils/multiple_choice.py: https://github.com/open-compass/VLMEvalKit). What they match to
no option is wrong: no judge is asked, and nothing is drawn. `--circular` asks each question once for every rotation
of its options, and all answers have to be right.
"""

import base64
import binascii
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from data.images import open_embedded
from evaluation.tasks.files import required_file
from evaluation.tasks.task import Question, Score
from utils import UserError


LETTERS = "ABCD"
COPY = 1_000_000  # a rotated copy of question i has the index i + k * COPY
INSTRUCTION = "Answer with the option's letter from the given choices directly."
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


@dataclass(frozen=True)
class Choice:
    """A question with its options in one order. `group` is the question's index without rotations."""

    index: int
    group: int
    question: str
    options: tuple[str, ...]
    answer: str  # a letter
    category: str
    image: str  # base64, or the index of the question that has it

    def rotated(self) -> "Choice":
        """Options one place on: what was B is A. The original's --all-rounds, and MMBench's own copies."""
        answer = LETTERS[(LETTERS.index(self.answer) - 1) % len(self.options)]
        return replace(self, index=self.index + COPY, options=self.options[1:] + self.options[:1], answer=answer)

    @property
    def prompt(self) -> str:
        options = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *options, INSTRUCTION])


@dataclass(frozen=True)
class MMBench:
    questions: list[Question]
    choices: list[Choice]
    metric: str = "accuracy"

    def score(self, answers: list[str]) -> list[Score]:
        """1 for a question whose every rotation is answered right."""
        right: dict[int, bool] = {}
        categories = {choice.group: choice.category for choice in self.choices}
        for choice, answer in zip(self.choices, answers, strict=True):
            is_right = match_option(answer, choice.options) == choice.answer
            right[choice.group] = right.get(choice.group, True) and is_right
        return [Score(str(group), categories[group], float(is_right)) for group, is_right in right.items()]


def load(dataset: str | None, limit: int = 0, circular: bool = False) -> MMBench:
    """Raises UserError for a file in another format, or one without answers."""
    path = required_file(dataset, "mmbench", "MMBench's .tsv")
    rows = read_rows(path)
    choices = [to_choice(row, path) for row in rows]
    first = [choice for choice in choices if choice.index == choice.group][: limit or None]
    if not first:
        raise UserError(f"--dataset {path}: there is no question in it")
    copies = defaultdict(list)
    for choice in choices:
        copies[choice.group].append(choice)
    asked = [each for choice in first for each in rotations(choice, copies[choice.group])] if circular else first
    images = {choice.index: choice.image for choice in choices}
    questions = [
        Question(
            id=str(choice.index),
            prompt=choice.prompt,
            references=[choice.answer],
            images=partial(open_images, images, choice, path),
            type=choice.category,
        )
        for choice in asked
    ]
    return MMBench(questions, asked)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The table as pandas reads it, like the original: an option that says "None" or "nan" counts as missing."""
    try:
        table = pd.read_table(path, dtype=str)
    except (OSError, ValueError) as error:
        raise UserError(f"--dataset {path}: cannot be read as a table ({' '.join(str(error).split())})") from None
    needed = ("index", "image", "question", "A", "B")
    if missing := [name for name in needed if name not in table]:
        raise UserError(f"--dataset {path}: no column {missing[0]!r}: is it MMBench's .tsv?")
    if "answer" not in table or table["answer"].isna().any():
        raise UserError(f"--dataset {path}: it has no answers; the test split is scored by MMBench's server alone")
    return table.to_dict("records")


def to_choice(row: dict[str, Any], path: Path) -> Choice:
    options = []
    for letter in LETTERS:
        if is_none(row.get(letter)):
            break
        options.append(str(row[letter]))
    where = f"--dataset {path}, index {row['index']}"
    if row["answer"] not in list(LETTERS[: len(options)]):
        raise UserError(f"{where}: the answer {row['answer']!r} is none of its {len(options)} options")
    try:
        index = int(row["index"])
    except ValueError:
        raise UserError(f"{where}: expected a whole number") from None
    hint = [] if is_none(row.get("hint")) else [str(row["hint"])]
    return Choice(
        index=index,
        group=index % COPY,
        question="\n".join([*hint, str(row["question"])]),
        options=tuple(options),
        answer=row["answer"],
        category="" if is_none(row.get("category")) else str(row["category"]),
        image=str(row["image"]),
    )


def is_none(value: Any) -> bool:
    return pd.isna(value) or (isinstance(value, str) and value.lower() in ("nan", "none"))


def rotations(choice: Choice, copies: list[Choice]) -> list[Choice]:
    """The file's own copies of a question, or its rotations where the file has none."""
    if len(copies) > 1:
        return copies
    turns = [choice]
    while len(turns) < len(choice.options):
        turns.append(turns[-1].rotated())
    return turns


def open_images(images: dict[int, str], choice: Choice, path: Path) -> list[Image.Image]:
    """A copy's image may be the index of the question whose image it is."""
    content = images.get(choice.index, images[choice.group])
    if content.isdecimal() and int(content) in images:
        content = images[int(content)]
    try:
        decoded = base64.b64decode(content, validate=True)
    except binascii.Error:
        raise UserError(f"--dataset {path}, index {choice.index}: 'image' is not base64") from None
    return [open_embedded(decoded, f"in {path}", str(choice.index))]


def match_option(answer: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that an answer names: as a letter of its own, else by its text. None: no option."""
    letters = LETTERS[: len(options)]
    if "Failed to obtain answer via API" not in answer:
        if any(refusal in answer for refusal in REFUSALS):
            return None
        words = answer.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
        named = [letter for letter in letters if letter in words]
        if len(named) == 1:
            return named[0]
        if not named and "Z" in words:
            return None
    written = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in answer.lower()]
    return written[0] if len(written) == 1 else None
