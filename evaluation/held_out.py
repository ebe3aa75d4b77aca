"""Answer held-out questions before and after training, and count the exact answers."""

import math
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin

from chat.encoding import count_tokens
from chat.images import shrunk_size
from chat.messages import messages_for
from data.dataset import ConversationDataset
from data.worst_case import Row, fitting_row
from evaluation.answer import answer_batches
from evaluation.tasks import conversations
from evaluation.tasks.task import Question
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
    max_image_pixels: int = 0  # larger images are shrunk to so many; 0: none is
    longest: Row | None = None

    @classmethod
    def of(
        cls,
        dataset: ConversationDataset | None,
        processor: ProcessorMixin,
        batch_size: int,
        max_new_tokens: int | None = None,
        positions: float = math.inf,
        max_image_pixels: int = 0,
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
        prompts, replies = zip(
            *[num_tokens(processor, question, max_image_pixels) for question in questions], strict=True
        )
        room = positions - max(prompts)
        if room < (max_new_tokens or 1):
            asked = f"--max_new_tokens {max_new_tokens}" if max_new_tokens else "the held-out data"
            raise UserError(
                f"{asked}: the longest held-out prompt has {max(prompts)} tokens, and the language model {positions} "
                "positions for prompt and answer; choose less, or leave long prompts out"
            )
        longest_answer = max_new_tokens or min(max(replies), room)
        longest = longest_question(questions, processor, max(prompts) + longest_answer, max_image_pixels)
        return cls(questions, batch_size, longest_answer, max_image_pixels, longest)

    @property
    def when(self) -> str:
        """What the run is doing while it answers them, for a message."""
        return f"while answering held-out questions, {self.batch_size} at a time (--per_device_eval_batch_size)"


def longest_question(
    questions: list[Question], processor: ProcessorMixin, num_tokens: int, max_image_pixels: int
) -> Row:
    """A row of so many tokens with as many images as any question has, each as large as the largest."""
    num_images = max(question.num_images for question in questions)
    sizes = {size for question in questions for size in question.image_sizes or ()}
    if not sizes:
        return Row(num_tokens, num_images)
    return fitting_row(processor, num_tokens, num_images, sizes, max_image_pixels)


def num_tokens(processor: ProcessorMixin, question: Question, max_image_pixels: int = 0) -> tuple[int, int]:
    """Tokens of the prompt, image positions counted, and of the reference with its end of turn."""
    reply = {"from": "gpt", "value": question.references[0]}
    prompt, answered = (
        messages_for(processor, turns) for turns in (question.conversation, [*question.conversation, reply])
    )
    sizes = None
    if question.image_sizes is not None:
        sizes = [[shrunk_size(size, max_image_pixels) for size in question.image_sizes]]
    (num_prompt_tokens,), _ = count_tokens(processor, [prompt], sizes, add_generation_prompt=True)
    _, (num_reply_tokens,) = count_tokens(processor, [answered], sizes)
    return int(num_prompt_tokens), int(num_reply_tokens)


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
    sizes = (held_out.batch_size, held_out.max_new_tokens, held_out.max_image_pixels)
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
