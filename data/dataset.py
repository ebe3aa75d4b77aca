"""LLaVA data: a .json array or .jsonl lines of conversations about images, read once into memory-mapped Arrow.

The format is described in data/README.md. Images are opened one by one, in the loader's workers.
"""

import inspect
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

import datasets
import ijson
import pyarrow.compute as pc
import torch
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
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
SAVED_STATE = "state.json"  # in every folder of Dataset.save_to_disk


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

    It is validated and converted once, as a stream; later runs map the cached Arrow file.

    Raises:
        UserError: there is no such file, or a record is not in the format. It names the record.
    """
    path = Path(path)
    if path.is_dir() and not (path / SAVED_STATE).is_file():
        raise UserError(f"data set {path}: not a folder made by Dataset.save_to_disk; of several splits, name one's")
    if not path.exists():
        raise UserError(f"data set {path}: no such file, give a LLaVA .json or .jsonl")
    try:
        return datasets.Dataset.from_generator(
            read_records, features=FEATURES, gen_kwargs={"path": str(path)}, fingerprint=_fingerprint(path)
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _fingerprint(path: Path) -> str:
    """The cache's key: which file, in which state (ctime tells what kept size and mtime), read by which rules."""
    file = path / SAVED_STATE if path.is_dir() else path
    status = file.stat()
    rules = Path(__file__).read_text(encoding="utf-8") + inspect.getsource(to_messages)
    return Hasher.hash((str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, rules))


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """The records of a file or of a saved data set one by one, checked. Raises UserError, also where there is none."""
    index = -1
    try:
        for index, record in enumerate(_read(path)):
            yield check_record(record, index, path)
    except OSError as error:
        raise UserError(f"data set {path}: cannot be read ({error.strerror or error})") from None
    if index < 0:
        raise UserError(f"data set {path}: there is no record in it")


def _read(path: str) -> Iterator[Any]:
    if os.path.isdir(path):
        yield from _read_saved(path)
        return
    with open(path, "rb") as file:
        if file.read(len(UTF8_BOM)) != UTF8_BOM:
            file.seek(0)
        yield from (_read_jsonl if path.endswith(".jsonl") else _read_json)(file, path)


def _read_saved(path: str) -> Iterator[Any]:
    try:
        records = datasets.load_from_disk(path)
        if not FEATURES.keys() <= records.features.keys():
            raise UserError(f"data set {path}: expected a single split with the columns {', '.join(FEATURES)}")
        records = records.select_columns(list(FEATURES)).rename_column("images", "image")  # as in a LLaVA record
        for table in records.with_format("arrow").iter(batch_size=1000):
            yield from table.to_pylist()
    except (ValueError, KeyError) as error:  # what pyarrow and datasets raise on damaged files
        raise UserError(f"data set {path}: damaged ({error}); save it again") from None


def _read_json(file: BinaryIO, path: str) -> Iterator[Any]:
    num_records = 0
    try:
        for record in ijson.items(file, "item", use_float=True):
            yield record
            num_records += 1
    except ijson.JSONError as error:
        reason = f"after {num_records} records: {str(error).splitlines()[0]}"
        raise UserError(f"data set {path}: not a JSON array ({reason}); is it .jsonl?") from None


def _read_jsonl(file: BinaryIO, path: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data set {path}, line {number}: not JSON ({error})") from None


def check_record(record: Any, index: int, path: str) -> dict[str, Any]:
    """One LLaVA record in the form of `FEATURES`. Raises UserError naming the record and what is wrong with it."""
    where = f"data set {path}, record {index}"
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with 'conversations', found {type(record).__name__}")
    record_id = index if record.get("id") is None else record["id"]
    if isinstance(record_id, bool) or not (isinstance(record_id, int) or _is_text(record_id)):
        raise UserError(f"{where}: 'id' must be a string or a whole number, found {brief(record_id)}")
    where += f" (id {record_id})"

    images = [] if record.get("image") is None else record["image"]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(_is_text(name) and name for name in images):
        raise UserError(f"{where}: 'image' must be a file name or a list of them, found {brief(images)}")
    for name in images:
        _check_inside(name, where)

    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' must be a list of turns, found {brief(turns)}")
    for turn in turns:
        if not isinstance(turn, dict) or not all(_is_text(turn.get(key)) for key in ("from", "value")):
            raise UserError(f"{where}: every turn needs the strings 'from' and 'value', found {brief(turn)}")
    try:
        messages = to_messages(turns)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if [message["role"] for message in messages[:2]] != ["user", "assistant"]:
        raise UserError(f"{where}: expected a turn from human and a reply from gpt")
    num_placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_placeholders != len(images):
        raise UserError(f"{where}: {num_placeholders} {IMAGE_TOKEN} placeholders but {len(images)} images")
    conversations = [{"from": turn["from"], "value": turn["value"]} for turn in turns]
    return {"id": str(record_id), "images": images, "conversations": conversations}


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON may escape half a surrogate pair, which Arrow refuses."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _check_inside(name: str, where: str) -> None:
    """A data set may not read files outside its image folder. Links are looked at when the file is opened."""
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".." or "\0" in name:
        raise UserError(f"{where}: image {name} leaves the image folder; use paths inside it")


def check_images(records: datasets.Dataset, image_folder: Path) -> None:
    """Every image is there. Each name is looked up once, without decoding it."""
    names = pc.unique(pc.list_flatten(records.data.column("images"))).to_pylist()
    for name in names:
        if not os.path.isfile(os.path.join(image_folder, name)):  # several times faster than pathlib
            index = next(i for i, images in enumerate(records["images"]) if name in images)
            where = f"record {index} (id {records[index]['id']})"
            raise UserError(f"{where}: no image {image_folder / name}; is --image_folder right?")


def open_image(image_folder: Path, name: str, record_id: str) -> Image.Image:
    """Decode an image to RGB. EXIF rotation is left alone, as in the original.

    Raises:
        UserError: it is missing, truncated, too large, no image, or a link out of the folder.
    """
    path = image_folder / name
    where = f"record {record_id}: image {path}"
    try:
        if not path.resolve().is_relative_to(image_folder.resolve()):
            raise UserError(f"{where} leaves the image folder; use files inside it")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise UserError(f"{where} cannot be decoded ({error}); replace or remove it") from None
