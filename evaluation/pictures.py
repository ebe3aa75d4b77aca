"""What TensorBoard shows of an evaluation: scores, and images with question, answer and prediction."""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch.utils.tensorboard import SummaryWriter

from evaluation.tasks.task import Question, Score, by_type, mean_score
from utils import markdown_table


PICTURE_WIDTH = 320  # pixels
NUM_PICTURES = 12


def write_tensorboard(
    folder: Path, metric: str, questions: list[Question], answers: list[str], scores: list[Score]
) -> None:
    """`eval/METRIC`, `eval/METRIC_TYPE`, `eval/samples`. The samples are the same whatever model has answered, so that
    two runs under one folder can be compared side by side."""
    values = {score.id: score.value for score in scores}
    chosen = np.linspace(0, len(questions) - 1, min(NUM_PICTURES, len(questions))).round().astype(int)
    pictures, rows = [], []
    for index in chosen.tolist():
        question, answer = questions[index], answers[index]
        mark = f"score {values[question.id]:.2f}" if question.id in values else ""
        image = (question.images() or [Image.new("RGB", (PICTURE_WIDTH, PICTURE_WIDTH), "lightgrey")])[0]
        pictures.append(captioned(image, caption(question.prompt, question.references, answer, mark)))
        rows.append((question.id, question.prompt, in_one_line(question.references), answer, mark))
    height = max(picture.height for picture in pictures)
    tiles = [ImageOps.expand(picture, (0, 0, 0, height - picture.height), "white") for picture in pictures]
    table = markdown_table(["id", "question", "answer", "prediction", ""], rows)
    with SummaryWriter(folder) as writer:
        writer.add_scalar(f"eval/{metric}", mean_score(scores), 0)
        for kind, group in by_type(scores).items():
            writer.add_scalar(f"eval/{metric}_{kind}", group["score"], 0)
        writer.add_images("eval/samples", np.stack(tiles), 0, dataformats="NHWC")
        writer.add_text("eval/samples", table, 0)


def caption(question: str, references: list[str], prediction: str, mark: str) -> list[str]:
    """Lines: the question, the right answers, the prediction and its score."""
    predicted = f"predicted: {prediction} ({mark})" if mark else f"predicted: {prediction}"
    return [question, f"answer: {in_one_line(references)}", predicted]


def in_one_line(references: list[str]) -> str:
    return " / ".join(dict.fromkeys(references))  # TextVQA's ten repeat themselves


def captioned(image: Image.Image, lines: list[str]) -> Image.Image:
    """The image, resized to a fixed width, above the lines."""
    image = image.resize((PICTURE_WIDTH, round(PICTURE_WIDTH * image.height / image.width)))
    text = "\n".join(line for paragraph in lines for line in textwrap.wrap(paragraph, width=40)[:4])
    canvas = Image.new("RGB", (PICTURE_WIDTH, image.height + 20 * (text.count("\n") + 1) + 8), "white")
    canvas.paste(image)
    ImageDraw.Draw(canvas).text((8, image.height + 4), text, fill="black", font_size=16)
    return canvas
