"""Conversations about images from LLaVA files, parquet, saved data sets or the hub, kept as memory-mapped Arrow.

The formats are described in data/README.md. Text is read once. Images are opened one by one, in the loader's workers;
those that lie inside parquet or Arrow files stay there.
"""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from PIL import Image

import data.records
import data.sources
from data.images import naming, open_embedded, open_image
from data.records import check_record
from data.sources import Source, find_source
from processing_mgm import to_messages
from utils import UserError, brief_error


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Value("string")),  # null: the image is inside the source
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    }
)
EMBEDDED_FEATURES = datasets.Features({**FEATURES, "row": datasets.Value("int64")})  # where in the source


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations with their images decoded. Nothing is open until a sample is asked for, so workers can have it."""

    def __init__(self, records: datasets.Dataset, image_folder: Path, source: Source) -> None:
        self.records = records
        self.image_folder = image_folder
        self.source = source

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`id`, `conversations` (LLaVA turns) and `images` (RGB). Raises UserError for an image that cannot be had."""
        record = self.records[index]
        return {"id": record["id"], "conversations": record["conversations"], "images": self._images(record)}

    def _images(self, record: dict[str, Any]) -> list[Image.Image]:
        names = record["images"]
        embedded = [None] * len(names)
        if None in names:
            with naming(f"record {record['id']}: the images in {self.source.name}"):
                embedded = self.source.images(record["row"])
        return [
            open_image(self.image_folder, name, record["id"])
            if name is not None
            else open_embedded(image["bytes"], f"{i} in {self.source.name}", record["id"])
            for i, (name, image) in enumerate(zip(names, embedded, strict=True))
        ]


def open_dataset(path: str | Path, image_folder: str | Path | None = None) -> ConversationDataset:
    """The conversations in `path` with the images in `image_folder` (default: beside `path`), all seen to exist."""
    if image_folder is None:
        image_folder = Path(path).parent if os.path.exists(path) else "."  # a hub id has no folder beside it
    folder = Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"--image_folder {folder}: no such folder")
    source = find_source(path)
    records = load_records(source)
    check_images(records, folder)
    return ConversationDataset(records, folder, source)


def load_conversations(path: str | Path) -> datasets.Dataset:
    """The conversations of a file, a folder or a hub id as `FEATURES`, with images inside as `EMBEDDED_FEATURES`.

    They are validated and converted once, as a stream; later runs map the cached Arrow file.

    Raises:
        UserError: there is no such data set, or a record is not in the format. It names the record.
    """
    return load_records(find_source(path))


def load_records(source: Source) -> datasets.Dataset:
    """The source's records, checked, mapped from the cache. Raises UserError for the first that is bad."""
    rules = [inspect.getsource(part) for part in (data.sources, data.records, read_records, to_messages)]
    try:
        return datasets.Dataset.from_generator(
            read_records,
            features=EMBEDDED_FEATURES if source.image_column else FEATURES,
            gen_kwargs={"source": source},
            fingerprint=Hasher.hash((source.state, rules)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def read_records(source: Source) -> Iterator[dict[str, Any]]:
    """The records one by one, checked. Raises UserError, also where there is none."""
    index = -1
    try:
        for index, record in enumerate(source.records()):
            row = {"row": index} if source.image_column else {}
            yield {**check_record(record, index, source.name), **row}
    except (OSError, pa.ArrowException) as error:
        reason = f"cannot be read after {index + 1} records ({brief_error(error)}); check it or save it again"
        raise UserError(f"data set {source.name}: {reason}") from None
    if index < 0:
        raise UserError(f"data set {source.name}: there is no record in it")


def check_images(records: datasets.Dataset, image_folder: Path) -> None:
    """Every image that is a file is there. Each name is looked up once, without decoding it."""
    names = pc.drop_null(pc.unique(pc.list_flatten(records.data.column("images"))))
    for name in names:
        name = name.as_py()
        if not os.path.isfile(os.path.join(image_folder, name)):  # several times faster than pathlib
            index = next(i for i, images in enumerate(records["images"]) if name in images)
            where = f"record {index} (id {records[index]['id']})"
            raise UserError(f"{where}: no image {image_folder / name}; is --image_folder right?")
