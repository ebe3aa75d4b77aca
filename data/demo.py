"""The demo's data: questions about handwritten numbers, written to data/demo/ on first use.

    python -m data.demo

Images are put together from the 1797 8x8 scans of scikit-learn's digits (UCI's optical recognition of handwritten
digits). A scan belongs either to training or to validation, for the demo and for the tiny model alike.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image


DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_VERSION = 5  # raise it when the files change: older ones are then replaced
NUM_IMAGES = {"train": 8000, "validation": 200}
NUM_VALIDATION_SCANS = 297
IMAGE_SIDE, DIGIT_SIDE = 64, 20  # pixels

DEMO_QUESTIONS: dict[str, tuple[str, Callable[[list[int]], str]]] = {
    "number": ("What is the number?", lambda digits: "".join(map(str, digits))),
    "parity": ("Is it even or odd?", lambda digits: "odd" if digits[-1] % 2 else "even"),
    "sum": ("What is the sum of the digits?", lambda digits: str(sum(digits))),
    "largest": ("What is the largest digit?", lambda digits: str(max(digits))),
}
# Images from one question of a type to the next. The last two are hard for a model this small: most weight is on the
# first two, which it can learn in minutes.
ASKED_EVERY = {"number": 1, "parity": 1, "largest": 4, "sum": 8}


@dataclass(frozen=True)
class Scan:
    """One handwritten digit: `index` in scikit-learn's data, the grey image and what it shows."""

    index: int
    image: Image.Image
    label: int


def load_digits():
    """scikit-learn's Bunch. Imported late: whoever brings a data set of their own does not wait for scikit-learn."""
    from sklearn import datasets

    return datasets.load_digits()


@cache
def load_scans(split: str) -> dict[int, list[Scan]]:
    """The scans of `train` or `validation`, by digit."""
    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    chosen = order[:NUM_VALIDATION_SCANS] if split == "validation" else order[NUM_VALIDATION_SCANS:]
    scans = {label: [] for label in range(10)}
    for index in chosen:
        pixels = (digits.images[index] * (255 / 16)).astype("uint8")
        scans[digits.target[index]].append(Scan(index, Image.fromarray(pixels), int(digits.target[index])))
    return scans


def draw_number(scans: list[Scan], rng: random.Random, distortion: float = 1.0) -> Image.Image:
    """The scans side by side in the middle of a page, dark ink on pale paper, each slightly turned and shifted."""
    paper = tuple(rng.randint(215, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 70) for _ in range(3))
    page = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), paper)
    left = (IMAGE_SIDE - DIGIT_SIDE * len(scans)) / 2
    for place, scan in enumerate(scans):
        side = round(DIGIT_SIDE * (1 + distortion * rng.uniform(-0.08, 0.08)))
        mask = scan.image.resize((side, side), Image.Resampling.BICUBIC)
        mask = mask.rotate(distortion * rng.uniform(-6, 6), Image.Resampling.BILINEAR)
        centre = (DIGIT_SIDE - side) / 2
        x = left + DIGIT_SIDE * place + centre + distortion * rng.uniform(-1, 1)
        y = (IMAGE_SIDE - side) / 2 + distortion * rng.uniform(-1.5, 1.5)
        page.paste(ink, (round(x), round(y)), mask)
    return page


def choose_scans(scans: dict[int, list[Scan]], num_digits: int, rng: random.Random) -> list[Scan]:
    """Scans for a number in which every digit is as likely; no number of several digits begins with 0."""
    first = 1 if num_digits > 1 else 0
    return [rng.choice(scans[rng.randint(0 if place else first, 9)]) for place in range(num_digits)]


def ensure_demo(folder: Path | str = DEMO_FOLDER) -> Path:
    """Write the demo unless it is there already: `train.json`, `validation.json` (LLaVA's form), `images/`.

    Takes a few seconds. Any number of processes may call it at once: each writes beside the folder, and the first to
    be ready gives its work the folder's name.
    """
    folder = Path(folder)
    if _is_current(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_demo(partial)
        if folder.exists() and not _is_current(folder):
            folder.rename(partial / "outdated")
            shutil.rmtree(partial / "outdated")
        partial.rename(folder)
    except OSError:
        if not _is_current(folder):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_current(folder: Path) -> bool:
    version = folder / "version.txt"
    return version.is_file() and version.read_text() == str(DEMO_VERSION)


def write_demo(folder: Path) -> None:
    (folder / "images").mkdir()
    folder.chmod(0o755)  # mkdtemp's is private
    for split, num_images in NUM_IMAGES.items():
        rng = random.Random(split)
        samples = []
        for i in range(num_images):
            scans = choose_scans(load_scans(split), rng.choice((2, 2, 3)), rng)
            image = f"images/{split}-{i:05}.png"
            draw_number(scans, rng).save(folder / image, compress_level=1)
            questions = {name for name, every in ASKED_EVERY.items() if i % every == 0}
            samples += demo_samples(f"{split}-{i:05}", image, [scan.label for scan in scans], questions)
        (folder / f"{split}.json").write_text(json.dumps(samples, indent=1))
    (folder / "version.txt").write_text(str(DEMO_VERSION))


def demo_samples(name: str, image: str, digits: list[int], question_types: Set[str]) -> list[dict]:
    """One LLaVA sample a question; the question's type ends the id: `validation-00012-sum`."""
    return [
        {
            "id": f"{name}-{question_type}",
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer(digits)},
            ],
        }
        for question_type, (question, answer) in DEMO_QUESTIONS.items()
        if question_type in question_types
    ]


if __name__ == "__main__":
    print(ensure_demo())
