"""Conversations about images from LLaVA files, parquet, saved data sets or the hub, kept as memory-mapped Arrow.

The formats are described in data/README.md. Text is read once. Images are opened one by one, in the loader's workers;
those that lie inside parquet or Arrow files stay there.
"""

import inspect
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

import datasets
import ijson
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher
from PIL import Image

from processing_mgm import IMAGE_TOKEN, to_messages
from utils import UserError


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Value("string")),  # null: the image is inside the source
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    }
)
EMBEDDED_FEATURES = datasets.Features({**FEATURES, "row": datasets.Value("int64")})  # where in the source
IMAGE_COLUMNS, TURN_COLUMNS = ("images", "image"), ("conversations", "messages")
EMBEDDED = object()  # stands for an image inside the source, where others have a name
ROWS_AT_ONCE = 32  # of a source with images inside: some megabytes
UTF8_BOM = b"\xef\xbb\xbf"
SAVED_STATE = "state.json"  # in every folder of Dataset.save_to_disk


class JsonFile:
    """A .json or .jsonl file of records."""

    image_column = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.state = file_state(path)

    def records(self) -> Iterator[Any]:
        """Whatever the file holds, one by one."""
        with open(self.name, "rb") as file:
            if file.read(len(UTF8_BOM)) != UTF8_BOM:
                file.seek(0)
            yield from (_read_jsonl if self.name.endswith(".jsonl") else _read_json)(file, self.name)


class ArrowTable:
    """A data set of `datasets`, memory-mapped: what load_dataset or load_from_disk return."""

    def __init__(self, name: str, dataset: datasets.Dataset, state: Any) -> None:
        self.name, self.state = name, state
        self.columns, self.image_column = check_columns(name, dataset.features.arrow_schema)
        self.dataset = dataset.select_columns(self.columns).with_format("arrow")

    def records(self) -> Iterator[dict[str, Any]]:
        for table in self.dataset.iter(batch_size=ROWS_AT_ONCE if self.image_column else 1000):
            yield from table_records(table)

    def images(self, row: int) -> list[dict[str, Any]]:
        """The images of a row: `bytes` and `path` each."""
        return as_list(self.dataset.select_columns(self.image_column)[row].column(0)[0].as_py())


class ParquetFiles:
    """Parquet files, read in place, none kept open. An image costs the part of its row group that lies before it."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        self.name, self.state = name, [file_state(path) for path in paths]
        self.groups: list[tuple[str, int]] = []  # file and number of every row group
        num_rows = []
        self.columns, self.image_column = check_columns(str(paths[0]), pq.read_schema(paths[0]))
        for path in paths:
            with pq.ParquetFile(path) as file:
                if check_columns(str(path), file.schema_arrow) != (self.columns, self.image_column):
                    raise UserError(f"data set {path}: other columns than {paths[0]}; write them alike")
                self.groups += [(str(path), number) for number in range(file.num_row_groups)]
                num_rows += [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        self.starts = np.cumsum([0, *num_rows])  # the row that each group begins with, and the end

    def records(self) -> Iterator[dict[str, Any]]:
        for group in self.groups:
            for table in self._tables(*group, self.columns, ROWS_AT_ONCE if self.image_column else 1000):
                yield from table_records(table)

    def images(self, row: int) -> list[dict[str, Any]]:
        """The images of a row: `bytes` and `path` each."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        tables = self._tables(*self.groups[group], [self.image_column], ROWS_AT_ONCE)
        offset = row - int(self.starts[group])
        while offset >= len(table := next(tables)):
            offset -= len(table)
        return as_list(table.column(0)[offset].as_py())

    def _tables(self, path: str, group: int, columns: list[str], num_rows: int) -> Iterator[pa.Table]:
        # Without pre_buffer and with a buffer, pages are read one after the other, not the row group as a whole.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            for batch in file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


Source = JsonFile | ArrowTable | ParquetFiles


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


def find_source(path: str | Path) -> Source:
    """What `path` names. Raises UserError where it is nothing that can be read."""
    name, path = str(path), Path(path)
    if not path.exists():
        return open_hub(name)
    try:
        if (path / SAVED_STATE).is_file():
            return ArrowTable(name, datasets.load_from_disk(str(path)), file_state(path / SAVED_STATE))
        if path.is_dir():
            return ParquetFiles(name, find_parquet(path))
        return ParquetFiles(name, [path]) if path.suffix == ".parquet" else JsonFile(path)
    except (ValueError, KeyError) as error:  # what pyarrow and datasets raise on damaged files
        raise UserError(f"data set {path}: damaged ({brief_error(error)}); save it again") from None
    except OSError as error:
        raise UserError(f"data set {path}: cannot be read ({brief_error(error)}); save it again") from None


def file_state(path: Path) -> tuple[str, int, int, int]:
    """Which file, in which state: ctime tells what kept size and mtime."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def find_parquet(folder: Path) -> list[Path]:
    """The .parquet files of a folder, by name. Raises UserError where there are none or those of several splits."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        reason = "neither made by Dataset.save_to_disk nor with .parquet files in it; of several splits, name one's"
        raise UserError(f"data set {folder}: {reason}")
    splits = sorted({match[1] for path in paths if (match := re.match(r"(.+?)-\d+-of-\d+", path.name))})
    if len(splits) > 1:
        raise UserError(f"data set {folder}: files of several splits ({', '.join(splits)}); move one's to a folder")
    return paths


def open_hub(name: str) -> ArrowTable:
    """`owner/name` or `owner/name:split` from the hub. Raises UserError where it cannot be had."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", name)
    if match is None or Path(name).suffix in (".json", ".jsonl", ".parquet"):
        raise UserError(f"data set {name}: no such file, give a LLaVA .json or .jsonl, .parquet, a folder or a hub id")
    try:
        dataset = datasets.load_dataset(match[1], split=match[2] or "train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = brief_error(error)
        raise UserError(f"data set {name}: no such path, and not to be had from the hub ({reason})") from None
    return ArrowTable(name, dataset, dataset._fingerprint)


def brief_error(error: Exception) -> str:
    """The system's word for it, or the message's first line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_columns(name: str, schema: pa.Schema) -> tuple[list[str], str | None]:
    """The columns to read, and which of them has images inside, if any. Raises UserError where there are no turns."""
    turns = next((column for column in TURN_COLUMNS if column in schema.names), None)
    if turns is None:
        expected = " or ".join(map(repr, TURN_COLUMNS))
        raise UserError(f"data set {name}: expected a column {expected}, found {', '.join(schema.names)}")
    images = next((column for column in IMAGE_COLUMNS if column in schema.names), None)
    columns = [column for column in ("id", images, turns) if column in schema.names]
    return columns, images if images is not None and is_embedded(schema.field(images).type) else None


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column holds images as `datasets.Image` stores them: a struct of bytes and path, or a list of such."""
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}


def table_records(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as records. Images are file names, or EMBEDDED where the row has the bytes, which are not copied."""
    columns = {
        name: image_names(table.column(name))
        if name in IMAGE_COLUMNS and is_embedded(table.schema.field(name).type)
        else table.column(name).to_pylist()
        for name in table.column_names
    }
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def image_names(column: pa.ChunkedArray) -> list[list[Any] | None]:
    """For each row, a list with the path of every image, or EMBEDDED."""
    is_list = not pa.types.is_struct(column.type)
    images = pc.list_flatten(column) if is_list else column
    lengths = pc.list_value_length(column).to_pylist() if is_list else pc.cast(column.is_valid(), "int8").to_pylist()
    has_bytes = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
    paths = pc.struct_field(images, "path").to_pylist()
    names = iter([EMBEDDED if inside else path for inside, path in zip(has_bytes, paths, strict=True)])
    return [None if length is None else list(itertools.islice(names, length)) for length in lengths]


def load_records(source: Source) -> datasets.Dataset:
    """The source's records, checked, mapped from the cache. Raises UserError for the first that is bad."""
    rules = Path(__file__).read_text(encoding="utf-8") + inspect.getsource(to_messages)
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

    images = _check_names(record, where)
    is_messages = record.get("conversations") is None and "messages" in record
    turns = to_turns(record["messages"], where) if is_messages else record.get("conversations")
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
    names = [None if name is EMBEDDED else name for name in images]
    return {"id": str(record_id), "images": names, "conversations": conversations}


def _check_names(record: dict[str, Any], where: str) -> list[Any]:
    """The record's image names, EMBEDDED for those inside the data set."""
    key = "images" if record.get("image") is None and "images" in record else "image"
    images = [] if record.get(key) is None else record[key]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(name is EMBEDDED or _is_text(name) and name for name in images):
        raise UserError(f"{where}: '{key}' must be a file name or a list of them, found {brief(images)}")
    for name in images:
        if name is not EMBEDDED:
            _check_inside(name, where)
    return images


def to_turns(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages as transformers has them to LLaVA turns. Raises UserError for what is neither text nor an image."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of messages, found {brief(messages)}")
    turns, num_images = [], 0
    for message in messages:
        if not isinstance(message, dict) or not _is_text(message.get("role")):
            raise UserError(f"{where}: every message needs 'role' and 'content', found {brief(message)}")
        parts = message.get("content")
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if not isinstance(parts, list):
            raise UserError(f"{where}: 'content' must be a string or a list of parts, found {brief(parts)}")
        values = []
        for part in parts:
            values.append(_part_value(part, num_images, where))
            num_images += isinstance(part, dict) and part.get("type") == "image"
        turns.append({"from": message["role"], "value": "".join(values)})
    return turns


def _part_value(part: Any, num_images: int, where: str) -> str:
    """A part's text, or the placeholder for the image with the number `num_images`."""
    if isinstance(part, dict) and part.get("type") == "text" and _is_text(part.get("text")):
        return part["text"]
    if isinstance(part, dict) and part.get("type") == "image":
        if part.get("index") not in (None, num_images):
            raise UserError(f"{where}: image {part['index']} is asked for out of turn; put the images in order")
        return IMAGE_TOKEN + "\n"
    raise UserError(f"{where}: a part of 'content' must be of type text, with a 'text', or image, found {brief(part)}")


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
    """Every image that is a file is there. Each name is looked up once, without decoding it."""
    names = pc.drop_null(pc.unique(pc.list_flatten(records.data.column("images"))))
    for name in names:
        name = name.as_py()
        if not os.path.isfile(os.path.join(image_folder, name)):  # several times faster than pathlib
            index = next(i for i, images in enumerate(records["images"]) if name in images)
            where = f"record {index} (id {records[index]['id']})"
            raise UserError(f"{where}: no image {image_folder / name}; is --image_folder right?")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever goes wrong with an image becomes a UserError that starts with `where`. Huge images are refused too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise UserError(f"{where} cannot be decoded ({brief_error(error)}); replace or remove it") from None


def open_image(image_folder: Path, name: str, record_id: str) -> Image.Image:
    """Decode an image to RGB. EXIF rotation is left alone, as in the original.

    Raises:
        UserError: it is missing, truncated, too large, no image, or a link out of the folder.
    """
    path = image_folder / name
    where = f"record {record_id}: image {path}"
    with naming(where):
        if not path.resolve().is_relative_to(image_folder.resolve()):
            raise UserError(f"{where} leaves the image folder; use files inside it")
        return read_rgb(path)


def open_embedded(content: bytes, name: str, record_id: str) -> Image.Image:
    """Decode an image's file content to RGB, with the checks of `open_image`."""
    with naming(f"record {record_id}: image {name}"):
        return read_rgb(io.BytesIO(content))


def read_rgb(file: Path | BinaryIO) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
