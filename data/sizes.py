"""The width and height of every image, for models whose tokens depend on them. Only the images' headers are read."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from chat.images import PHOTO, Size
from data.cache import naming_the_cache, num_processes
from data.dataset import ConversationDataset
from data.images import path_of, read_size, size_of_image
from data.sources import Source
from utils import UserError


IMAGE_SIZES = "image_sizes"  # a column: of each image its width and height, in pixels
SIZES_VERSION = 1  # of the cached sizes
RECORDS_PER_PROCESS = 20_000  # some seconds of reading headers
FEATURES = datasets.Features({IMAGE_SIZES: datasets.List(datasets.List(datasets.Value("int32")))})
NOT_INSIDE = (0, 0)  # in the place of an image that its row does not hold, or not so that it can be read


def with_image_sizes(dataset: ConversationDataset) -> datasets.Dataset:
    """The data set's records with the sizes of their images. They are read once, and cached.

    The cache's key covers the images' names, sizes in bytes and times.

    Raises:
        UserError: an image cannot be read, and bad samples are not skipped.
    """
    records = dataset.records
    inside = sizes_inside(dataset.source) if "row" in records.column_names else None
    key = (records._fingerprint, state_of_files(dataset), dataset.source.state, dataset.skips_bad, SIZES_VERSION)
    with naming_the_cache():
        sizes = records.map(
            lambda batch: {IMAGE_SIZES: [sizes_of(record, dataset, inside) for record in rows_of(batch)]},
            batched=True,
            features=FEATURES,
            num_proc=num_processes(len(records), RECORDS_PER_PROCESS),
            remove_columns=records.column_names,
            new_fingerprint=Hasher.hash(key),
            desc="Reading the images' sizes",
        )
    return datasets.concatenate_datasets([records, sizes], axis=1)


def rows_of(batch: dict[str, list]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def sizes_of(record: dict[str, Any], dataset: ConversationDataset, inside: datasets.Dataset | None) -> list[Size]:
    """The sizes of a record's images, in files or in the data set. Raises UserError as with_image_sizes does."""
    found = inside[record["row"]][IMAGE_SIZES] if None in record["images"] else [NOT_INSIDE] * len(record["images"])
    try:
        return [
            size_of(i, name, tuple(size), record, dataset)
            for i, (name, size) in enumerate(zip(record["images"], found, strict=True))
        ]
    except UserError:
        if not dataset.skips_bad:
            raise
        return [PHOTO] * len(record["images"])  # it will be skipped when it is opened


def size_of(index: int, name: str | None, inside: Size, record: dict[str, Any], dataset: ConversationDataset) -> Size:
    if name is not None:
        return read_size(dataset.image_folder, name, record["id"], dataset.follow_links)
    return inside if inside != NOT_INSIDE else dataset.open_images(record)[index].size


def state_of_files(dataset: ConversationDataset) -> str:
    """Identifies the content of the image files that the records name."""
    state = hashlib.sha256(os.path.abspath(dataset.image_folder).encode())
    names = pc.drop_null(pc.unique(pc.list_flatten(dataset.records.data.column("images"))))
    for name in names:
        status = os.stat(path_of(dataset.image_folder, name.as_py()))
        state.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return state.hexdigest()


def sizes_inside(source: Source) -> datasets.Dataset:
    """For each row of a source with images inside, their sizes. NOT_INSIDE for what is a file or cannot be read."""
    with naming_the_cache():
        return datasets.Dataset.from_generator(
            read_sizes_inside,
            features=FEATURES,
            gen_kwargs={"source": source},
            fingerprint=Hasher.hash((source.state, "image sizes", SIZES_VERSION)),
        )


def read_sizes_inside(source: Source) -> Iterator[dict[str, list[Size]]]:
    for buffers in source.image_buffers():
        yield {IMAGE_SIZES: [size_inside(buffer) for buffer in buffers]}


def size_inside(content: pa.Buffer | None) -> Size:
    try:
        return NOT_INSIDE if content is None else size_of_image(pa.BufferReader(content))
    except Exception:  # on a broken file Pillow's decoders raise anything; sizes_of says what
        return NOT_INSIDE
