"""`demo`: the first question of every conversation in a LLaVA file (or any other source of data/README.md)."""

from dataclasses import dataclass
from functools import partial

from chat.messages import to_messages
from data.dataset import ConversationDataset, open_dataset
from data.demo import DEMO_QUESTIONS, ensure_demo
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
    for index, record in enumerate(dataset.records.select_columns(["id", "conversations"])):
        user, assistant = to_messages(record["conversations"])[:2]
        *pictures, text = user["content"]
        suffix = record["id"].rpartition("-")[2]
        questions.append(
            Question(
                id=record["id"],
                prompt=text["text"],
                references=[assistant["content"][0]["text"]],
                images=partial(first_images, dataset, index, len(pictures)),
                num_images=len(pictures),
                type=suffix if suffix in DEMO_QUESTIONS else "",
            )
        )
    return questions


def first_images(dataset: ConversationDataset, index: int, num_images: int) -> list:
    """The images of the first question: later turns may have images too."""
    return dataset[index]["images"][:num_images]


def is_exact(prediction: str, reference: str) -> bool:
    return normalize(prediction) == normalize(reference)


def normalize(text: str) -> str:
    """Exact match is blind to case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").casefold()
