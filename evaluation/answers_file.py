"""Write answers as they come, so that an interrupted evaluation goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from evaluation.tasks.task import Question
from utils import UserError


def weights_stamp(*folders: str | None) -> list[list[Any]]:
    """Name, bytes and time of each file of weights in these folders: other weights give other answers. A hub id, which
    is no folder, has none."""
    files = [file for folder in folders if folder for file in sorted(Path(folder).glob("*.safetensors"))]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class AnswersFile:
    """A JSON-lines file: the run's settings, then a line for each answer. Closed with `close`.

    Raises:
        UserError: the file holds answers of a run with other settings, or to other questions.
    """

    def __init__(self, path: Path, settings: dict[str, Any], questions: list[Question]) -> None:
        self.path, self.questions = path, questions
        self.answers: dict[int, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"settings": settings}) + "\n"
        kept = self._read(settings) if path.exists() else ""
        self.file = open(path, "w" if not kept else "r+")  # noqa: SIM115 (open while answers come)
        self.file.write(kept or header)
        self.file.truncate()  # a line that was cut off
        self.file.flush()

    def _read(self, settings: dict[str, Any]) -> str:
        """Keep and return the complete lines of an interrupted run."""
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            return ""
        try:
            found, *rows = map(json.loads, lines)
            self.answers = {row["index"]: row["prediction"] for row in rows}
            before = found["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is not a file of answers: choose another --output") from None
        if changed := [name for name in settings if settings[name] != before.get(name)]:
            raise UserError(
                f"{self.path} holds answers of a run with another {' and '.join(changed)}: "
                "delete it or choose another --output"
            )
        prompts = dict(enumerate(question.prompt for question in self.questions))
        if any(row.get("question") != prompts.get(row["index"]) for row in rows):
            raise UserError(f"{self.path} holds answers to other questions: delete it or choose another --output")
        return "".join(lines)

    def write(self, answers: dict[int, str]) -> None:
        self.answers |= answers
        for index, answer in answers.items():
            question = self.questions[index]
            row = {"index": index, "id": question.id, "type": question.type, "question": question.prompt}
            row |= {"references": question.references, "prediction": answer}
            self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
