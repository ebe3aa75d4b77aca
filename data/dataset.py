"""Conversations about images from LLaVA files, parquet, saved data sets or the hub, kept as memory-mapped Arrow.

data/README.md describes the formats. Text is read once. Images are opened when a sample is asked for, in the loader's
workers. Images inside parquet or Arrow files stay there.
"""

import hashlib
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

from data.cache import naming_the_cache
from data.images import ImageLookup, naming, open_embedded, open_image
from data.records import check_record
from data.sources import Source, find_source
from utils import UserError, brief_error


# Of the cached records. Raise it when sources, records or to_messages change what is read or refused.
RECORDS_VERSION = 2
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Value("string")),  # null: the image is inside the source
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    }
)
EMBEDDED_FEATURES = datasets.Features({**FEATURES, "row": datasets.Value("int64")})  # where in the source
PROBLEM = "problem"  # a column and a key: why a record or a sample cannot be used
NO_RECORD = {"id": "", "images": [], "conversations": []}
NO_CONVERSATION = [{"from": "human", "value": ""}]  # without a reply there is nothing to learn from it
FILLER = None  # the index of no sample: such a conversation, for a process that would be left without one


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations with their images decoded. No file is open until a sample is asked for, so workers can copy it."""

    def __init__(
        self,
        records: datasets.Dataset,
        image_folder: Path,
        source: Source,
        problems: dict[int, str] | None = None,
        follow_links: bool = False,
        num_moved: int = 0,
    ) -> None:
        """
        Args:
            problems: why records were left out, by their number. None: bad samples are not skipped.
            follow_links: allow links out of the image folder.
            num_moved: images found where MGM's own loader looks for them (`data.images.path_of`).
        """
        self.records = records
        self.image_folder = image_folder
        self.source = source
        self.problems = problems or {}
        self.skips_bad = problems is not None
        self.follow_links = follow_links
        self.num_moved = num_moved
        # Training data has these two. They are set once its lengths are measured.
        self.num_cut = 0  # samples that lose the end of their replies
        self.digest: dict[str, Any] = {}  # `digest_records`, by which a resumed run recognizes the data

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        """`id`, `conversations` (LLaVA turns) and `images` (RGB). A FILLER has no id, no image and no reply.

        If bad samples are skipped, one whose images cannot be loaded has no image and no reply, but a `problem`, its
        `index`, and the `num_label_tokens` that are lost. Else it raises UserError.
        """
        if index is FILLER:
            return {"conversations": NO_CONVERSATION, "images": []}
        record = self.records[index]
        try:
            return {"id": record["id"], "conversations": record["conversations"], "images": self.open_images(record)}
        except UserError as error:
            if not self.skips_bad:
                raise
            nothing = {"id": record["id"], "conversations": NO_CONVERSATION, "images": []}
            return nothing | {
                PROBLEM: str(error),
                "index": index,
                "num_label_tokens": record.get("num_label_tokens", 0),
            }

    def open_images(self, record: dict[str, Any]) -> list[Image.Image]:
        """A record's images, decoded. Raises UserError for one that cannot be."""
        names = record["images"]
        embedded = [None] * len(names)
        if None in names:
            with naming(f"record {record['id']}: the images in {self.source.name}"):
                embedded = self.source.images(record["row"])
        return [
            open_image(self.image_folder, name, record["id"], self.follow_links)
            if name is not None
            else open_embedded(image["bytes"], f"{i} in {self.source.name}", record["id"])
            for i, (name, image) in enumerate(zip(names, embedded, strict=True))
        ]


def open_dataset(
    path: str | Path,
    image_folder: str | Path | None = None,
    skips_bad: bool = False,
    follow_links: bool = False,
) -> ConversationDataset:
    """The conversations in `path` with the images in `image_folder` (default: beside `path`). Each image must exist.

    Args:
        skips_bad: leave bad records out instead of raising for the first.
        follow_links: allow links out of the image folder.

    Raises:
        UserError: a record is not in the format, an image is missing or a link out of the folder. With `skips_bad`:
            no record can be used.
    """
    if image_folder is None:
        image_folder = Path(path).parent if os.path.exists(path) else "."  # a hub id has no folder beside it
    folder = Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"--image_folder {folder}: no such folder")
    source = find_source(path)
    records = load_records(source, skips_bad)
    lookup = ImageLookup(folder, follow_links)
    missing = find_missing_images(records, lookup)
    found = {"follow_links": follow_links, "num_moved": lookup.num_moved}
    if not skips_bad:
        if missing:
            others = f" ({len(missing)} records in all have such a problem)" if len(missing) > 1 else ""
            raise UserError(next(iter(missing.values())) + others)
        return ConversationDataset(records, folder, source, **found)
    malformed = records[PROBLEM]
    problems = {index: problem for index, problem in enumerate(malformed) if problem is not None} | missing
    if len(problems) == len(records):
        raise UserError(f"data set {path}: no record can be used; the first: {problems[0]}")
    kept = [index for index in range(len(records)) if index not in problems]
    return ConversationDataset(records.select(kept).remove_columns(PROBLEM), folder, source, problems, **found)


def digest_records(records: datasets.Dataset) -> dict[str, Any]:
    """The number of records, and a hash of their texts and image names in order. No image is read.

    It hashes Arrow's own bytes: 1.2 million records take three seconds, or thirty after a `select`.
    """
    names = [name for name in ("conversations", "images", "row") if name in records.column_names]
    content = hashlib.sha256()
    for table in records.select_columns(names).with_format("arrow").iter(batch_size=10_000):
        for batch in table.combine_chunks().to_batches():  # chunk borders depend on the cache
            content.update(batch.serialize())
    return {"num_records": len(records), "sha256": content.hexdigest()[:16]}


def load_records(source: Source, skips_bad: bool = False) -> datasets.Dataset:
    """The source's records as `FEATURES`, or `EMBEDDED_FEATURES` if it holds images.

    They are checked and converted once, as a stream. Later runs map the cached Arrow file. Raises UserError for the
    first bad record.

    `skips_bad`: bad records are kept as empty ones, and a column `problem` says what is wrong with them.
    """
    try:
        features = EMBEDDED_FEATURES if source.image_column else FEATURES
        with naming_the_cache():
            return datasets.Dataset.from_generator(
                read_records,
                features=datasets.Features({**features, PROBLEM: datasets.Value("string")}) if skips_bad else features,
                gen_kwargs={"source": source, "skips_bad": skips_bad},
                fingerprint=Hasher.hash((source.state, RECORDS_VERSION, skips_bad)),
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def read_records(source: Source, skips_bad: bool = False) -> Iterator[dict[str, Any]]:
    """The records, checked. Raises UserError for a bad record, and if the source has none."""
    index = -1
    try:
        for index, record in enumerate(source.records()):
            row = {"row": index} if source.image_column else {}
            problem = {PROBLEM: None} if skips_bad else {}
            try:
                checked = check_record(record, index, source.name)
            except UserError as error:
                if not skips_bad:
                    raise
                checked, problem = NO_RECORD, {PROBLEM: str(error)}
            yield {**checked, **row, **problem}
    except (OSError, pa.ArrowException) as error:
        reason = f"cannot be read after {index + 1} records ({brief_error(error)}); check it or save it again"
        raise UserError(f"data set {source.name}: {reason}") from None
    if index < 0:
        raise UserError(f"data set {source.name}: there is no record in it")


def find_missing_images(records: datasets.Dataset, lookup: ImageLookup) -> dict[int, str]:
    """What is wrong with records whose image file cannot be used, by number. Each name is looked up once, and no file
    is opened."""
    names = pc.drop_null(pc.unique(pc.list_flatten(records.data.column("images"))))
    reasons = {n: reason for name in names if (reason := lookup.problem(n := name.as_py()))}
    if not reasons:
        return {}
    problems = {}
    for index, images in enumerate(records["images"]):
        if reason := next((reasons[name] for name in images if name in reasons), None):
            problems[index] = f"record {index} (id {records[index]['id']}): {reason}"
    return problems
