"""Read records from LLaVA files, parquet, saved data sets or the hub. Images inside them stay there."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import ijson
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from data.cache import naming_the_cache
from data.records import EMBEDDED, IMAGE_COLUMNS, TURN_COLUMNS, Malformed
from utils import UserError, brief_error


ROWS_AT_ONCE = 32  # read from a source with images inside: some megabytes
UTF8_BOM = b"\xef\xbb\xbf"
FOREIGN_HEADS = {
    b"version https://git-lfs": "this is Git LFS's pointer to the file, not the file: fetch it with git lfs pull",
    b"\x1f\x8b": "it is compressed: unpack it with gunzip",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}
JSON_REMEDIES = {  # by what the parser says
    "premature EOF": "the file ends too early: download or save it again",
    "integer overflow": "write whole numbers beyond 64 bits in quotes",
    "invalid bytes in UTF8": "save the file as UTF-8",
    "invalid character inside string": "write line breaks and tabs in a text as \\n and \\t",
    "comment": "JSON knows no comments: remove them",
    "unallowed token": "is there a comma too many?",
    "trailing garbage": "is it .jsonl?",
}
SAVED_STATE = "state.json"  # in every folder of Dataset.save_to_disk


class JsonFile:
    """A .json or .jsonl file of records."""

    image_column = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.state = file_state(path)

    def records(self) -> Iterator[Any]:
        """The file's records, not checked."""
        with open(self.name, "rb") as file:
            skip_bom(file)
            yield from (_read_jsonl if self.name.endswith(".jsonl") else _read_json)(file, self.name)


def skip_bom(file: BinaryIO) -> None:
    if file.read(len(UTF8_BOM)) != UTF8_BOM:
        file.seek(0)


class ArrowTable:
    """A data set of `datasets`, memory-mapped, as load_dataset and load_from_disk return it."""

    def __init__(self, name: str, dataset: datasets.Dataset, state: Any) -> None:
        self.name, self.state = name, state
        self.columns, self.image_column = check_columns(name, dataset.features.arrow_schema)
        self.dataset = dataset.select_columns(self.columns).with_format("arrow")

    def records(self) -> Iterator[dict[str, Any]]:
        for table in self.dataset.iter(batch_size=ROWS_AT_ONCE if self.image_column else 1000):
            yield from table_records(table)

    def image_buffers(self) -> Iterator[list[pa.Buffer | None]]:
        """The content of each row's images, not copied; None where the row does not hold it."""
        for table in self.dataset.select_columns(self.image_column).iter(batch_size=ROWS_AT_ONCE):
            yield from image_buffers(table.column(0))

    def images(self, row: int) -> list[dict[str, Any]]:
        """The images of a row: `bytes` and `path` each."""
        return as_list(self.dataset.select_columns(self.image_column)[row].column(0)[0].as_py())


class ParquetFiles:
    """Parquet files, read in place and not kept open. To read an image, its row group is read up to it."""

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
        self.starts = np.cumsum([0, *num_rows])  # each group's first row, and the number of rows

    def records(self) -> Iterator[dict[str, Any]]:
        for group in self.groups:
            for table in self._tables(*group, self.columns, ROWS_AT_ONCE if self.image_column else 1000):
                yield from table_records(table)

    def image_buffers(self) -> Iterator[list[pa.Buffer | None]]:
        """The content of each row's images; None where the row does not hold it."""
        for group in self.groups:
            for table in self._tables(*group, [self.image_column], ROWS_AT_ONCE):
                yield from image_buffers(table.column(0))

    def images(self, row: int) -> list[dict[str, Any]]:
        """The images of a row: `bytes` and `path` each."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        tables = self._tables(*self.groups[group], [self.image_column], ROWS_AT_ONCE)
        offset = row - int(self.starts[group])
        while offset >= len(table := next(tables)):
            offset -= len(table)
        return as_list(table.column(0)[offset].as_py())

    def _tables(self, path: str, group: int, columns: list[str], num_rows: int) -> Iterator[pa.Table]:
        # Without pre_buffer and with a buffer, pages are read one at a time, not the whole row group.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            for batch in file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


Source = JsonFile | ArrowTable | ParquetFiles


def find_source(path: str | Path) -> Source:
    """The source that `path` names. Raises UserError if it cannot be read."""
    name, path = str(path), Path(path)
    if not path.exists():
        return open_hub(name)
    try:
        if path.is_file():
            check_head(path)
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
    """Identifies a file's content. ctime also changes with a change that keeps size and mtime."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def find_parquet(folder: Path) -> list[Path]:
    """The .parquet files of a folder, by name. Raises UserError if there are none, or those of several splits."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        reason = "neither made by Dataset.save_to_disk nor with .parquet files in it; of several splits, name one's"
        raise UserError(f"data set {folder}: {reason}")
    splits = sorted({match[1] for path in paths if (match := re.match(r"(.+?)-\d+-of-\d+", path.name))})
    if len(splits) > 1:
        raise UserError(f"data set {folder}: files of several splits ({', '.join(splits)}); move one's to a folder")
    return paths


def open_hub(name: str) -> ArrowTable:
    """`owner/name` or `owner/name:split` from the hub. Raises UserError if it cannot be loaded."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", name)
    if match is None or Path(name).suffix in (".json", ".jsonl", ".parquet"):
        raise UserError(f"data set {name}: no such file, give a LLaVA .json or .jsonl, .parquet, a folder or a hub id")
    try:
        with naming_the_cache():
            dataset = datasets.load_dataset(match[1], split=match[2] or "train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = brief_error(error)
        raise UserError(f"data set {name}: no such path, and it cannot be loaded from the hub ({reason})") from None
    return ArrowTable(name, dataset, dataset._fingerprint)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_columns(name: str, schema: pa.Schema) -> tuple[list[str], str | None]:
    """The columns to read, and the one with images inside, if any. Raises UserError if there is no column of turns."""
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
    """The rows as records. An image is a file name, or EMBEDDED if the row holds its bytes, which are not copied."""
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


def image_buffers(column: pa.ChunkedArray) -> Iterator[list[pa.Buffer | None]]:
    """For each row, the content of every image, or None. It is not copied."""
    is_list = not pa.types.is_struct(column.type)
    contents = iter(pc.struct_field(pc.list_flatten(column) if is_list else column, "bytes"))
    lengths = pc.list_value_length(column).to_pylist() if is_list else [1] * len(column)
    for length in lengths:
        own = itertools.islice(contents, length or 0)
        yield [content.as_buffer() if content.is_valid else None for content in own]


def check_head(path: Path) -> None:
    """Raise UserError if the file's first bytes show another format than its name."""
    with open(path, "rb") as file:
        head = file.read(64)
    for start, problem in FOREIGN_HEADS.items():
        if head.startswith(start):
            raise UserError(f"data set {path}: {problem}")


def _read_json(file: BinaryIO, path: str) -> Iterator[Any]:
    num_records = 0
    try:
        for record in ijson.items(file, "item", use_float=True):
            yield record
            num_records += 1
    except ijson.JSONError as error:
        raise UserError(f"data set {path}: not a JSON array ({_explain(error, num_records)}") from None
    if not num_records and (key := _key_of_array(path)):
        remedy = "put it into an array" if key in TURN_COLUMNS else "save that array alone"
        raise UserError(f"data set {path}: there is no record in it, but one object with an array {key!r}: {remedy}")


def _explain(error: ijson.JSONError, num_records: int) -> str:
    """The end of a message: how many records were good, what is wrong after them, near which text, and the remedy."""
    message = error.args[0]  # three lines: the reason, the text around the place, and an arrow to it
    if isinstance(message, bytes):
        message = message.decode(errors="replace")
    reason, text, arrow = (message.splitlines() + ["", ""])[:3]
    near = text[max(0, arrow.find("^") - 20) :].strip()[:40] if "^" in arrow else ""
    remedy = next((remedy for part, remedy in JSON_REMEDIES.items() if part in message), "mend it there")
    if "invalid char in json text" in reason and re.search("NaN|Infinity", near):
        remedy = "NaN and Infinity are no JSON: write null"
    return f"after {num_records} records: {reason.strip(' .')}{f', near {near}' if near else ''}); {remedy}"


def _key_of_array(path: str) -> str | None:
    """If the file holds an object, the key of the first array in it."""
    with open(path, "rb") as file:
        skip_bom(file)
        for prefix, event, _ in ijson.parse(file):
            if event == "start_array":
                return prefix or None
    return None


def _read_jsonl(file: BinaryIO, path: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            remedy = "save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else "mend or remove the line"
            yield Malformed(f"data set {path}, line {number}: not JSON ({error}); {remedy}")
