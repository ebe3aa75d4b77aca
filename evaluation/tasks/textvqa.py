"""TextVQA (https://textvqa.org): questions about text in photographs, ten answers each.

Takes the benchmark's `TextVQA_0.5.1_val.json`. The published scores of LLaVA and MGM have the words of an OCR system
in the prompt: `--ocr_file` takes them from `TextVQA_Rosetta_OCR_v0.2_val.json`, or whole prompts from LLaVA's
`llava_textvqa_val_v051_ocr.jsonl`.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.tasks.files import images_in, listed, read_json, required_file
from evaluation.tasks.task import Question, Score, scores_of
from evaluation.tasks.textvqa_score import NUM_ANSWERS, textvqa_score
from utils import UserError


INSTRUCTION = "Answer the question using a single word or phrase."
FIELDS = {"question": str, "image_id": str, "question_id": (int, str), "answers": list}


@dataclass(frozen=True)
class TextVQA:
    questions: list[Question]
    metric: str = "accuracy"

    def score(self, answers: list[str]) -> list[Score]:
        references = [question.references for question in self.questions]
        return scores_of(self.questions, map(textvqa_score, answers, references))


def load(
    dataset: str | None,
    image_folder: str | None,
    limit: int = 0,
    follow_links: bool = False,
    ocr_file: str | None = None,
) -> TextVQA:
    """Raises UserError for a file in another format, a missing image, or a question without words of the OCR file."""
    path = required_file(dataset, "textvqa", "TextVQA_0.5.1_val.json")
    records = listed(read_json(path), "data", path, FIELDS)[: limit or None]
    for record in records:
        if len(record["answers"]) != NUM_ANSWERS or not all(isinstance(answer, str) for answer in record["answers"]):
            raise UserError(f"--dataset {path}, question {record['question_id']}: expected {NUM_ANSWERS} answers")
    prompts = build_prompts(records, ocr_file)
    open_images = images_in(image_folder, path, [image_name(record) for record in records], follow_links)
    return TextVQA(
        [
            Question(
                id=str(record["question_id"]),
                prompt=prompt,
                references=record["answers"],
                images=partial(open_images, image_name(record)),
            )
            for record, prompt in zip(records, prompts, strict=True)
        ]
    )


def image_name(record: dict[str, Any]) -> str:
    return f"{record['image_id']}.jpg"


def build_prompts(records: list[dict[str, Any]], ocr_file: str | None) -> list[str]:
    """LLaVA's prompts: the question, the OCR words where there is a file of them, the instruction; a line each."""
    if ocr_file is None:
        return [f"{record['question']}\n{INSTRUCTION}" for record in records]
    path = Path(ocr_file)
    if not path.is_file():
        raise UserError(f"--ocr_file {path}: no such file")
    if path.suffix == ".jsonl":
        return llava_prompts(records, path)
    fields = {"image_id": str, "ocr_tokens": list}
    ocr_records = listed(read_json(path, "ocr_file"), "data", path, fields, "ocr_file")
    words = {record["image_id"]: record["ocr_tokens"] for record in ocr_records}
    for record in records:
        if record["image_id"] not in words:
            raise UserError(f"--ocr_file {path}: it has no words of image {record['image_id']}")
    return [
        f"{record['question']}\nReference OCR token: {', '.join(words[record['image_id']])}\n{INSTRUCTION}"
        for record in records
    ]


def llava_prompts(records: list[dict[str, Any]], path: Path) -> list[str]:
    """The prompts of LLaVA's file, found as its scorer does: by the image and the question in lower case."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = {(line["question_id"], question_of(line["text"])): line["text"] for line in lines}
        return [prompts[record["image_id"], record["question"].lower()] for record in records]
    except KeyError as error:
        raise UserError(f"--ocr_file {path}: it has no prompt for {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"--ocr_file {path}: expected lines with 'question_id' and 'text'") from None


def question_of(prompt: str) -> str:
    """The question inside a prompt of two lines, or of three with the OCR words before or after it."""
    lines = prompt.split("\n")
    return lines[prompt.startswith("Reference OCR token:")].lower()
