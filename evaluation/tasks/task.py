"""Question, Score and Task: the terms that all tasks share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from PIL import Image

from chat.images import Size


@dataclass(frozen=True)
class Question:
    """One prompt. `images` opens them: many benchmarks do not fit into memory decoded."""

    id: str
    prompt: str  # what follows the image
    references: list[str]  # right answers
    images: Callable[[], list[Image.Image]]
    num_images: int = 1  # that `images` opens
    image_sizes: list[Size] | None = None  # None: the model's tokens do not depend on them
    turns: list[dict[str, str]] | None = None  # None: the images, then the prompt
    type: str = ""

    @property
    def conversation(self) -> list[dict[str, str]]:
        """In LLaVA's format, up to the reply."""
        if self.turns is not None:
            return self.turns
        return [{"from": "human", "value": "<image>\n" * self.num_images + self.prompt}]


@dataclass(frozen=True)
class Score:
    """Of one item. MMBench's circular evaluation makes one item of several questions."""

    id: str
    type: str
    value: float


class Task(Protocol):
    metric: str
    questions: list[Question]

    def score(self, answers: list[str]) -> list[Score]:
        """The items' scores from an answer to each question, in the questions' order. Their mean is the task's."""


def scores_of(questions: list[Question], values: Iterable[float]) -> list[Score]:
    """The scores of a task whose items are its questions."""
    return [Score(q.id, q.type, float(value)) for q, value in zip(questions, values, strict=True)]


def mean_score(scores: list[Score]) -> float:
    return fmean(score.value for score in scores)


def by_type(scores: list[Score]) -> dict[str, dict[str, float]]:
    """Mean and number of items for each question type, in order of appearance; empty where there are no types."""
    types = [kind for kind in dict.fromkeys(score.type for score in scores) if kind]
    groups = {kind: [score for score in scores if score.type == kind] for kind in types}
    return {kind: {"score": mean_score(group), "n": len(group)} for kind, group in groups.items()}
