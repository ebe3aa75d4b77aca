"""Captions scored with CIDEr (arXiv:1411.5726), from a file in COCO's format: `images` and `annotations`.

The score is that of COCO's own evaluation (pycocoevalcap: its tokenizer, which runs on Java, and its CIDEr).
"""

import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from evaluation.tasks.files import images_in, listed, read_json, required_file
from evaluation.tasks.task import Question, Score, scores_of
from utils import UserError


PROMPT = "Provide a one-sentence caption for the provided image."  # LLaVA-1.5's training data has these words


@dataclass(frozen=True)
class Captions:
    questions: list[Question]
    metric: str = "cider"

    def score(self, answers: list[str]) -> list[Score]:
        """CIDEr of each image. A word counts more the rarer it is in this set's references."""
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokenize = PTBTokenizer().tokenize
        references = tokenize(
            {i: [{"caption": text} for text in question.references] for i, question in enumerate(self.questions)}
        )
        candidates = tokenize({i: [{"caption": answer}] for i, answer in enumerate(answers)})
        _, values = Cider().compute_score(references, candidates)
        return scores_of(self.questions, values)


def load(dataset: str | None, image_folder: str | None, limit: int = 0, follow_links: bool = False) -> Captions:
    """An image is a question. Raises UserError for a file in another format, a missing image, an image without
    caption, or without Java."""
    if shutil.which("java") is None:
        raise UserError("--task caption: CIDEr's tokenizer runs on Java: install a JRE so that `java` is found")
    path = required_file(dataset, "caption", "a file of captions in COCO's format")
    document = read_json(path)
    images = listed(document, "images", path, {"id": (int, str), "file_name": str})[: limit or None]
    captions = defaultdict(list)
    for annotation in listed(document, "annotations", path, {"image_id": (int, str), "caption": str}):
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in images:
        if image["id"] not in captions:
            raise UserError(f"--dataset {path}: image {image['id']} has no caption")
    open_images = images_in(image_folder, path, [image["file_name"] for image in images], follow_links)
    return Captions(
        [
            Question(
                id=str(image["id"]),
                prompt=PROMPT,
                references=captions[image["id"]],
                images=partial(open_images, image["file_name"]),
            )
            for image in images
        ]
    )
