"""Read the benchmarks' own files. Whatever is wrong with one is reported in one line that names it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.images import ImageLookup, open_image
from utils import UserError, brief_error


def required_file(dataset: str | None, task: str, what: str) -> Path:
    """The path of `--dataset`. Raises UserError where there is no such file."""
    if dataset is None:
        raise UserError(f"--task {task} needs --dataset, {what}")
    path = Path(dataset)
    if not path.is_file():
        raise UserError(f"--dataset {path}: no such file; {what} is expected")
    return path


def read_json(path: Path, flag: str = "dataset") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {path}: cannot be read as JSON ({brief_error(error)})") from None


def listed(
    document: Any, key: str, path: Path, fields: dict[str, type | tuple[type, ...]], flag: str = "dataset"
) -> list[dict[str, Any]]:
    """The records under `key`, each with these fields of these types.

    Raises:
        UserError: the document is another, it has no record, or one lacks a field.
    """
    records = document.get(key) if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise UserError(f"--{flag} {path}: expected an object with the list {key!r}")
    if not records:
        raise UserError(f"--{flag} {path}: there is no record in {key!r}")
    for index, record in enumerate(records):
        for name, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise UserError(f"--{flag} {path}, {key!r} {index}: {name!r} is missing or of another type")
    return records


def images_in(
    folder: str | None, path: Path, names: list[str], follow_links: bool
) -> Callable[[str], list[Image.Image]]:
    """A function that opens an image by its name. Raises UserError where the folder or an image is missing, or an
    image is behind a link out of the folder and `follow_links` is not set."""
    image_folder = Path(folder) if folder is not None else path.parent
    if not image_folder.is_dir():
        raise UserError(f"--image_folder {image_folder}: no such folder")
    lookup = ImageLookup(image_folder, follow_links)
    for name in names:
        if problem := lookup.problem(name):
            raise UserError(problem)
    return partial(_open, image_folder, follow_links)


def _open(image_folder: Path, follow_links: bool, name: str) -> list[Image.Image]:
    return [open_image(image_folder, name, name, follow_links)]
