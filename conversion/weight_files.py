"""Weight files, a tensor at a time: .safetensors and .bin are read, .safetensors are written.

Nothing here holds a file's tensors together: they go from one file to the other in pieces, so that a checkpoint of any
size is converted in the memory of its largest tensor. (The pages of a mapped file count as the process's memory.)
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from utils import UserError


CHUNK_BYTES = 16 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A .safetensors file; `tensors` has its names in the order of their data. A context, while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks that header and size belong together
                pass
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
            self.tensors = {name: TensorInfo(DTYPES[e["dtype"]], tuple(e["shape"])) for name, e in entries}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error}): download it again") from None
        except KeyError as error:
            raise UserError(f"{path}: holds tensors of type {error}, which MGM has none of") from None
        self.offsets = {name: 8 + header_bytes + entry["data_offsets"][0] for name, entry in entries}
        self.file: BinaryIO | None = None

    def __enter__(self) -> "SafetensorsFile":
        self.file = self.path.open("rb", buffering=0)
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, in pieces; each is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.tensors[name].nbytes)))
        left = self.tensors[name].nbytes
        self.file.seek(self.offsets[name])
        while left:
            num_read = self.file.readinto(buffer[:left])
            if not num_read:
                raise UserError(f"{self.path}: ends inside {name}: it was changed while it was read")
            yield buffer[:num_read]
            left -= num_read

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        target, start = tensor_bytes(tensor), 0
        for chunk in self.chunks(name):
            target[start : start + len(chunk)] = chunk
            start += len(chunk)
        return tensor


class TorchFile:
    """The same over a .bin file, which is read with weights only, never unpickled freely."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self:
            # The order in which safetensors' own writer would lay them out: big types first keeps all aligned.
            names = sorted(self.loaded, key=lambda name: (-self.loaded[name].itemsize, name))
            self.tensors = {
                name: TensorInfo(self.loaded[name].dtype, tuple(self.loaded[name].shape)) for name in names
            }

    def __enter__(self) -> "TorchFile":
        # Files from before torch 1.6 are no archives and cannot be mapped.
        mmap = zipfile.is_zipfile(self.path)
        try:
            self.loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{self.path}: cannot be read as a file of weights alone ({reason})") from None
        if not isinstance(self.loaded, dict) or not all(isinstance(x, torch.Tensor) for x in self.loaded.values()):
            raise UserError(f"{self.path}: holds something other than named tensors")
        return self

    def __exit__(self, *_) -> None:
        self.loaded = {}

    def chunks(self, name: str) -> Iterator[memoryview]:
        data = tensor_bytes(self.read(name))
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    def read(self, name: str) -> torch.Tensor:
        return self.loaded[name].detach()


WeightFile = SafetensorsFile | TorchFile


def open_weights(path: Path) -> WeightFile:
    """Read what a file holds. Raises UserError, naming the file, where that cannot be done."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def find_weight_files(folder: Path) -> list[Path]:
    """A checkpoint's files, as transformers looks for them: one file, else the index's, safetensors before .bin.

    Raises:
        UserError: there are none, or some that the index names are missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
        if index.is_file():
            files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if missing := [path.name for path in files if not path.is_file()]:
                raise UserError(f"{folder}: {index.name} names files that are not there: {', '.join(missing)}")
            return files
        if files := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return files
    raise UserError(f"{folder}: there is no *.safetensors or *.bin in it")


def find_open_clip_files(folder: Path) -> list[Path]:
    """The files of an OpenCLIP folder; some hold the same weights in transformers' form beside OpenCLIP's own."""
    for pattern in ("open_clip_*.safetensors", "open_clip_*.bin", "*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{folder}: there is no *.safetensors or *.bin in it")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory, row by row (a copy only where the tensor lies otherwise in memory)."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(
    path: Path, tensors: dict[str, TensorInfo], chunks: Callable[[str], Iterable[memoryview]]
) -> None:
    """Write the bytes that `chunks(name)` yields for each tensor, in the order of `tensors`. Laid out to the byte as
    safetensors' own writer does, which wants all tensors in memory at once."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, info in tensors.items():
        start, end = end, end + info.nbytes
        entry = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for chunk in chunks(name):
                file.write(chunk)


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """`model.safetensors.index.json`: the file of every tensor and the bytes of all of them."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
