"""LLaVA data: a .json array or .jsonl lines of conversations about images, read once into memory-mapped Arrow.

The format is described in data/README.md. Images are opened one by one, in the loader's workers.
"""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import ijson
import pyarrow.compute as pc
import torch
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from processing_mgm import IMAGE_TOKEN, to_messages
from utils import UserError


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Value("string")),
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    }
)
UTF8_BOM = b"\xef\xbb\xbf"


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations with their images decoded. Nothing is open until a sample is asked for, so workers can have it."""

    def __init__(self, records: datasets.Dataset, image_folder: Path) -> None:
        self.records = records
        self.image_folder = image_folder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`id`, `conversations` (LLaVA turns) and `images` (RGB). Raises UserError for an image that cannot be had."""
        record = self.records[index]
        images = [open_image(self.image_folder, name, record["id"]) for name in record["images"]]
        return {"id": record["id"], "conversations": record["conversations"], "images": images}


def open_dataset(path: str | Path, image_folder: str | Path | None = None) -> ConversationDataset:
    """The conversations in `path` with the images in `image_folder` (default: beside `path`), all seen to exist."""
    folder = Path(image_folder) if image_folder is not None else Path(path).parent
    if not folder.is_dir():
        raise UserError(f"--image_folder {folder}: no such folder")
    records = load_conversations(path)
    check_images(records, folder)
    return ConversationDataset(records, folder)


def load_conversations(path: str | Path) -> datasets.Dataset:
    """A .json or .jsonl file in LLaVA's format, or a folder of `Dataset.save_to_disk`, as `FEATURES`.

    A file is validated and converted once, as a stream; later runs map the cached Arrow file.

    Raises:
        UserError: there is no such file, or a record is not in the format. It names the record.
    """
    path = Path(path)
    if path.is_dir():
        return _load_saved(path)
    if not path.is_file():
        raise UserError(f"data set {path}: no such file, give a LLaVA .json or .jsonl")
    status = path.stat()
    version = {"path": str(path.resolve()), "size": status.st_size, "modified_ns": status.st_mtime_ns}
    try:
        records = datasets.Dataset.from_generator(read_records, features=FEATURES, gen_kwargs=version)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except ValueError as error:  # datasets refuses a generator that yields nothing
        if path.stat().st_size and "corresponds to no data" not in str(error):
            raise
        raise UserError(f"data set {path}: there is no record in it") from None
    if len(records) == 0:
        raise UserError(f"data set {path}: there is no record in it")
    return records


def _load_saved(path: Path) -> datasets.Dataset:
    try:
        records = datasets.load_from_disk(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"data set {path}: not a folder made by Dataset.save_to_disk ({error})") from None
    if not isinstance(records, datasets.Dataset) or not FEATURES.keys() <= records.features.keys():
        raise UserError(f"data set {path}: expected a single split with the columns {', '.join(FEATURES)}")
    return records.select_columns(list(FEATURES)).cast(FEATURES)


def read_records(path: str, size: int, modified_ns: int) -> Iterator[dict[str, Any]]:
    """The file's records one by one, checked. `size` and `modified_ns` only tell the cache which file it was."""
    with open(path, "rb") as file:
        if file.read(len(UTF8_BOM)) != UTF8_BOM:
            file.seek(0)
        reader = _read_jsonl if path.endswith(".jsonl") else _read_json
        for index, record in enumerate(reader(file, path)):
            yield check_record(record, index, path)


def _read_json(file: BinaryIO, path: str) -> Iterator[Any]:
    try:
        yield from ijson.items(file, "item", use_float=True)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data set {path}: not a JSON array ({reason}); is it .jsonl?") from None


def _read_jsonl(file: BinaryIO, path: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"data set {path}, line {number}: not JSON ({error})") from None


def check_record(record: Any, index: int, path: str) -> dict[str, Any]:
    """One LLaVA record in the form of `FEATURES`. Raises UserError naming the record and what is wrong with it."""
    where = f"data set {path}, record {index}"
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with 'conversations', found {type(record).__name__}")
    record_id = str(record.get("id", index))
    where += f" (id {record_id})"

    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f"{where}: 'image' must be a file name or a list of them")
    for name in images:
        _check_inside(name, where)

    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' must be a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise UserError(f"{where}: every turn needs the strings 'from' and 'value'")
    try:
        messages = to_messages(turns)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if [message["role"] for message in messages[:2]] != ["user", "assistant"]:
        raise UserError(f"{where}: expected a turn from human and a reply from gpt")
    num_placeholders = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if num_placeholders != len(images):
        raise UserError(f"{where}: {num_placeholders} {IMAGE_TOKEN} placeholders but {len(images)} images")
    conversations = [{"from": turn["from"], "value": turn["value"]} for turn in turns]
    return {"id": record_id, "images": images, "conversations": conversations}


def _check_inside(name: str, where: str) -> None:
    """A data set may not read files outside its image folder."""
    if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
        raise UserError(f"{where}: image {name} leaves the image folder; use paths inside it")


def check_images(records: datasets.Dataset, image_folder: Path) -> None:
    """Every image is there. Each name is looked up once, without decoding it."""
    names = pc.unique(pc.list_flatten(records.data.column("images"))).to_pylist()
    for name in names:
        if not (image_folder / name).is_file():
            index = next(i for i, images in enumerate(records["images"]) if name in images)
            where = f"record {index} (id {records[index]['id']})"
            raise UserError(f"{where}: no image {image_folder / name}; is --image_folder right?")


def open_image(image_folder: Path, name: str, record_id: str) -> Image.Image:
    """Decode an image to RGB. EXIF rotation is left alone, as in the original.

    Raises:
        UserError: it is missing, truncated, too large, no image, or a link out of the folder.
    """
    path = image_folder / name
    if not path.resolve().is_relative_to(image_folder.resolve()):
        raise UserError(f"record {record_id}: image {path} leaves the image folder; use files inside it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"record {record_id}: image {path} cannot be decoded ({error}); replace or remove it"
        ) from None
