"""Weight files: what is written against safetensors' own writer, what is read, and what cannot be."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion.shards import read_shards, write_shards
from conversion.weight_files import find_open_clip_files, find_weight_files, read_weights
from utils import UserError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Several types, an empty tensor, one number alone, one that lies column by column."""
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5).to(torch.bfloat16),
        "a.weight": torch.randn(40, 30),
        "c.steps": torch.arange(3),
        "d.scale": torch.tensor(0.5),
        "e.empty": torch.zeros(0, 4),
        "ä.half": torch.randn(3).half(),
        "f.columns": torch.randn(6, 4).T,
    }


def copy(source: Path, folder: Path) -> bytes:
    """The file that is written of another one."""
    folder.mkdir()
    write_shards(read_shards([source], lambda name: name), folder)
    return next(folder.glob("*.safetensors")).read_bytes()


def test_copies_are_to_the_byte(tensors, tmp_path):
    """A file written by safetensors, copied, with itself."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert copy(tmp_path / "a.safetensors", tmp_path / "copy") == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("zip_format", [True, False], ids=["archive", "before torch 1.6"])
def test_bin_files(tensors, tmp_path, zip_format):
    """A .bin file turned into safetensors with what safetensors writes of the same tensors."""
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=zip_format)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "c.safetensors", metadata={"format": "pt"})
    assert copy(tmp_path / "a.bin", tmp_path / "copy") == (tmp_path / "c.safetensors").read_bytes()


def test_tensors_that_share_their_memory(tmp_path):
    """A .bin file may hold a tensor under two names, and a part of another: each is written whole."""
    whole = torch.randn(6, 4)
    torch.save({"a": whole, "b": whole, "c": torch.nn.Parameter(whole[2:, 1])}, tmp_path / "a.bin")
    save_file(
        {"a": whole, "b": whole.clone(), "c": whole[2:, 1].clone()}, tmp_path / "c.safetensors", {"format": "pt"}
    )
    assert copy(tmp_path / "a.bin", tmp_path / "copy") == (tmp_path / "c.safetensors").read_bytes()


def test_reading_changes_no_file(tensors, tmp_path):
    """Tensors lie in a mapped file: what is written into them stays in memory."""
    save_file({"a": torch.zeros(5000)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(5000)}, tmp_path / "a.bin")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.bin"):
        before = path.read_bytes()
        read_weights(path)["a"] += 1
        assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_read(tensors, tmp_path, suffix):
    """Every tensor that was saved with the one read back, its type included."""
    path = tmp_path / f"a.{suffix}"
    if suffix == "bin":
        torch.save(tensors, path)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    weights = read_weights(path)
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = weights[name]
        assert read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(read, tensor), name


class Harmful:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "legacy", "archive"])
def test_nothing_is_unpickled_freely(tmp_path, kind):
    """A .bin with an object in it is refused by name, and the object's code has not run."""
    path, evidence = tmp_path / "a.bin", tmp_path / "evidence"
    content = {"a": Harmful(evidence)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(UserError, match=r"a\.bin: cannot be read as a file of weights alone"):
        read_weights(path)
    assert not evidence.exists()


def test_something_other_than_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin: holds something other than named tensors"):
        read_weights(tmp_path / "a.bin")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tensors, tmp_path, suffix, share):
    """A download that broke off at the start, in the header, in the middle, at the end: the file is named."""
    path = tmp_path / f"a.{suffix}"
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    torch.save(tensors, path) if suffix == "bin" else save_file(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=rf"a\.{suffix}: cannot be read"):
        read_weights(path)


def test_unknown_types(tmp_path):
    """A quantised checkpoint's fp8."""
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: holds tensors of type torch.float8_e4m3fn"):
        read_weights(tmp_path / "a.safetensors")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def write_index(path: Path, *files: str) -> None:
    path.write_text(json.dumps({"weight_map": {f"tensor {i}": name for i, name in enumerate(files)}}))


def test_the_index_names_the_files(tmp_path):
    """Files that the index does not name (another format's, a trainer's) are not read; those it names must exist."""
    touch(tmp_path, "consolidated.safetensors", "training_args.bin", "model-00002-of-00002.safetensors")
    write_index(tmp_path / "model.safetensors.index.json", *["model-00002-of-00002.safetensors"] * 2, "x.safetensors")
    with pytest.raises(UserError, match=r"names files that are not there: x\.safetensors$"):
        find_weight_files(tmp_path)
    touch(tmp_path, "x.safetensors")
    assert [path.name for path in find_weight_files(tmp_path)] == ["model-00002-of-00002.safetensors", "x.safetensors"]


def test_order_of_preference(tmp_path):
    """Shards of .bin without an index, one .bin, safetensors: each is preferred to those before."""
    touch(tmp_path, "training_args.bin")
    with pytest.raises(UserError, match=r"there is no \*.safetensors or \*.bin in it"):
        find_weight_files(tmp_path)
    for name in ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin", "model.safetensors"):
        touch(tmp_path, name)
        assert [path.name for path in find_weight_files(tmp_path)] == [name]


def test_open_clip_files(tmp_path):
    """OpenCLIP's own names are preferred, safetensors among them."""
    for name in (
        "pytorch_model.bin",
        "model.safetensors",
        "open_clip_pytorch_model.bin",
        "open_clip_model.safetensors",
    ):
        touch(tmp_path, name)
        assert [path.name for path in find_open_clip_files(tmp_path)] == [name]


def test_broken_json(tmp_path):
    """An index that was cut off is named."""
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: cannot be read as JSON"):
        find_weight_files(tmp_path)
