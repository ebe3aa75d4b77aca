"""Find a checkpoint's weight files and read them: .safetensors, and .bin with weights only."""

import json
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils import UserError


Tensors = dict[str, torch.Tensor]


def read_weights(path: Path) -> Tensors:
    """A file's tensors by name. The file is mapped: a tensor takes memory once its values are used.

    Raises:
        UserError: the file is damaged, or holds something other than MGM's types of tensors. It names the file.
    """
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
    if narrow := {str(x.dtype) for x in tensors.values() if x.is_floating_point() and x.itemsize == 1}:
        raise UserError(f"{path}: holds tensors of type {', '.join(narrow)}, which MGM has none of")
    return tensors


def read_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}): download it again") from None


def read_bin(path: Path) -> Tensors:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: cannot be read as a file of weights alone ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise UserError(f"{path}: holds something other than named tensors")
    # safetensors does not write tensors that share their memory.
    uses = Counter(x.untyped_storage().data_ptr() for x in tensors.values())
    return {
        name: x.detach().clone() if uses[x.untyped_storage().data_ptr()] > 1 else x.detach()
        for name, x in tensors.items()
    }


def find_weight_files(folder: Path) -> list[Path]:
    """A checkpoint's files, in transformers' order: one file, else the index's, safetensors before .bin.

    Raises:
        UserError: there are none, or some that the index names are missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if missing := [path.name for path in files if not path.is_file()]:
                raise UserError(f"{folder}: {index.name} names files that are not there: {', '.join(missing)}")
            return files
        if files := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return files
    raise UserError(f"{folder}: there is no *.safetensors or *.bin in it")


def find_open_clip_files(folder: Path) -> list[Path]:
    """The files of an OpenCLIP folder. Some hold the same weights in transformers' form beside OpenCLIP's own."""
    for pattern in ("open_clip_*.safetensors", "open_clip_*.bin", "*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{folder}: there is no *.safetensors or *.bin in it")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
