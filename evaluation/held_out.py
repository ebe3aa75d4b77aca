"""Answer held-out questions before and after training, and count the exact answers."""

import math
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin

from data.dataset import ConversationDataset
from data.worst_case import Row
from evaluation.answer import answer_batches
from evaluation.tasks import conversations
from evaluation.tasks.task import Question
from layers.chunked_loss import IGNORE_INDEX
from models.generation import Answer
from utils import UserError


@dataclass(frozen=True)
class HeldOut:
    """The questions that train.py asks before and after training: the first one of every held-out sample.

    `longest` is the largest row, prompt and answer together.
    """

    questions: list[Question]
    batch_size: int
    max_new_tokens: int = 0
    longest: Row | None = None

    @classmethod
    def of(
        cls,
        dataset: ConversationDataset | None,
        processor: ProcessorMixin,
        batch_size: int,
        max_new_tokens: int | None = None,
        positions: float = math.inf,
    ) -> "HeldOut":
        """The samples of a data set, or none.

        Args:
            max_new_tokens: None: as many as the longest reply has, and as there is room for.
            positions: of the language model, for prompt and answer.

        Raises:
            UserError: the longest prompt leaves no room for an answer, or not for so many tokens.
        """
        questions = conversations.to_questions(dataset) if dataset is not None else []
        if not questions:
            return cls([], batch_size)
        prompts, replies = zip(*[num_tokens(processor, question) for question in questions], strict=True)
        room = positions - max(prompts)
        if room < (max_new_tokens or 1):
            asked = f"--max_new_tokens {max_new_tokens}" if max_new_tokens else "the held-out data"
            raise UserError(
                f"{asked}: the longest held-out prompt has {max(prompts)} tokens, and the language model {positions} "
                "positions for prompt and answer; choose less, or leave long prompts out"
            )
        longest_answer = max_new_tokens or min(max(replies), room)
        num_images = max(question.num_images for question in questions)
        return cls(questions, batch_size, longest_answer, Row(max(prompts) + longest_answer, num_images))

    @property
    def when(self) -> str:
        """What the run is doing while it answers them, for a message."""
        return f"while answering held-out questions, {self.batch_size} at a time (--per_device_eval_batch_size)"


def num_tokens(processor: ProcessorMixin, question: Question) -> tuple[int, int]:
    """Tokens of the prompt, image positions counted, and of the reference with its end of turn."""
    reply = {"from": "gpt", "value": question.references[0]}
    _, labels = processor.tokenize([*question.conversation, reply])
    is_label = [label != IGNORE_INDEX for label in labels]
    return is_label.index(True) if any(is_label) else len(labels), sum(is_label)  # the prompt ends at the first label


@dataclass(frozen=True)
class Prediction:
    index: int  # of the sample in the data set
    id: str
    question: str
    answer: str
    prediction: str
    is_cut: bool  # the prediction had not ended

    @property
    def is_exact(self) -> bool:
        return conversations.is_exact(self.prediction, self.answer)


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    processor: ProcessorMixin,
    held_out: HeldOut,
) -> list[Prediction]:
    """Answer the questions, divided among the processes. Every process returns all predictions."""
    if not held_out.questions:
        return []
    was_training = model.training
    model.eval()
    answers: dict[int, Answer] = {}
    indices = list(range(len(held_out.questions)))
    sizes = (held_out.batch_size, held_out.max_new_tokens)
    for found in answer_batches(accelerator, model, processor, held_out.questions, indices, *sizes):
        answers |= found
    model.train(was_training)
    return [
        Prediction(i, question.id, question.prompt, question.references[0], answers[i].text, answers[i].is_cut)
        for i, question in enumerate(held_out.questions)
    ]


def exact_match(predictions: list[Prediction]) -> float:
    """The share of predictions that equal their reference, 0 to 1."""
    return sum(prediction.is_exact for prediction in predictions) / len(predictions)
