"""`demo`: the first question of every conversation in a LLaVA file (or any other source of data/README.md)."""

from dataclasses import dataclass
from functools import partial

from chat.messages import IMAGE_TOKEN, ROLES
from data.dataset import ConversationDataset, open_dataset
from data.demo import DEMO_QUESTIONS, ensure_demo
from data.sizes import IMAGE_SIZES
from evaluation.tasks.task import Question, Score, scores_of


@dataclass(frozen=True)
class Conversations:
    questions: list[Question]
    metric: str = "exact_match"

    def score(self, answers: list[str]) -> list[Score]:
        references = [question.references[0] for question in self.questions]
        return scores_of(self.questions, map(is_exact, answers, references))


def load(dataset: str | None, image_folder: str | None, limit: int = 0, follow_links: bool = False) -> Conversations:
    """The demo's held-out questions where no data set is named. Raises UserError as `open_dataset` does."""
    questions = to_questions(
        open_dataset(dataset or ensure_demo() / "validation.json", image_folder, follow_links=follow_links)
    )
    return Conversations(questions[: limit or None])


def to_questions(dataset: ConversationDataset) -> list[Question]:
    """The first question of each conversation, whose reply is the reference. Its type ends the demo's ids."""
    questions = []
    columns = [name for name in ("id", "conversations", IMAGE_SIZES) if name in dataset.records.column_names]
    for index, record in enumerate(dataset.records.select_columns(columns)):
        turns, reply = up_to_the_first_reply(record["conversations"])
        num_images = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
        sizes = record.get(IMAGE_SIZES)
        prompt = turns[-1]["value"]
        suffix = record["id"].rpartition("-")[2]
        questions.append(
            Question(
                id=record["id"],
                prompt=prompt.replace(IMAGE_TOKEN, "").strip() if num_images else prompt,
                references=[reply],
                images=partial(first_images, dataset, index, num_images),
                num_images=num_images,
                type=suffix if suffix in DEMO_QUESTIONS else "",
                image_sizes=None if sizes is None else [tuple(size) for size in sizes[:num_images]],
                turns=turns,
            )
        )
    return questions


def up_to_the_first_reply(conversation: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """The turns before the first reply to a question, and that reply. A reply to nothing is left out."""
    turns: list[dict[str, str]] = []
    for turn in conversation:
        role = ROLES[turn["from"]]
        if role == "assistant" and turns and ROLES[turns[-1]["from"]] == "user":
            return turns, turn["value"]
        turns += [turn] * (role != "assistant")
    raise ValueError("there is no question with a reply in it")


def first_images(dataset: ConversationDataset, index: int, num_images: int) -> list:
    """The images of the first question: later turns may have images too."""
    return dataset[index]["images"][:num_images]


def is_exact(prediction: str, reference: str) -> bool:
    return normalize(prediction) == normalize(reference)


def normalize(text: str) -> str:
    """Exact match is blind to case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").casefold()
