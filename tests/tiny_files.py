"""Small data sets and checkpoints that several tests read, change and compare."""

from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file

from data.dataset import load_records
from data.sources import find_source


LORA_TARGETS = r".*\blanguage_model\..*\.(q_proj|v_proj|o_proj)"  # as train.py's flags name them


def load_conversations(path: str | Path) -> datasets.Dataset:
    """The conversations of a file, a folder or a hub id, checked."""
    return load_records(find_source(path))


def edit_tensors(folder: Path, edit) -> None:
    """Replace the tensors of every weight file by `edit(tensors)`."""
    for path in sorted(folder.glob("*.safetensors")):
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all of a folder's weight files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types and bits."""
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
