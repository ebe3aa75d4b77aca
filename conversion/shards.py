"""A checkpoint as a list of shards: found and renamed, checked against the model, written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from configuration_mgm import MGMConfig
from conversion.weight_files import read_weights
from modeling_mgm import MGMForConditionalGeneration
from utils import UserError


EMBEDDINGS, LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]  # by their names in our layout


@dataclass(frozen=True)
class Shard:
    """A file to be written, and where its tensors come from."""

    source: Path
    file_name: str
    infos: Tensors  # types and shapes of the tensors to write, without values
    load: Callable[[], Tensors]  # the values: may return more tensors than `infos` names


def find_shards(files: list[Path], rename: Callable[[str], str | None]) -> list[Shard]:
    """A shard for each file, with the tensors for which `rename` returns a name. It keeps the file's name."""
    shards = []
    for path in files:

        def load(path: Path = path) -> Tensors:
            return {ours: tensor for name, tensor in read_weights(path).items() if (ours := rename(name)) is not None}

        if infos := {name: tensor.to("meta") for name, tensor in load().items()}:
            shards.append(Shard(path, path.stem.replace("pytorch_model", "model") + ".safetensors", infos, load))
    return shards


def rename_file(shards: list[Shard], old: str, new: str) -> list[Shard]:
    return [replace(shard, file_name=new) if shard.file_name == old else shard for shard in shards]


def all_infos(shards: list[Shard]) -> Tensors:
    """Type and shape of every tensor. Raises UserError for a name that two files have."""
    infos: Tensors = {}
    for shard in shards:
        if twice := sorted(infos.keys() & shard.infos.keys()):
            raise UserError(f"{shard.source}: another file has the same tensors too: {', '.join(twice)}")
        infos |= shard.infos
    return infos


def embeddings_dtype(shards: list[Shard]) -> torch.dtype:
    infos = all_infos(shards)
    return infos[EMBEDDINGS].dtype if EMBEDDINGS in infos else torch.float32


def drop_tied_head(shards: list[Shard], is_tied: bool) -> None:
    """Leave out a head that repeats the embeddings. Raises UserError where it differs from what it is tied to."""
    holders = {name: shard for shard in shards for name in (LM_HEAD, EMBEDDINGS) if name in shard.infos}
    if not is_tied or LM_HEAD not in holders:
        return
    head, embeddings = (holders[name].load()[name] if name in holders else None for name in (LM_HEAD, EMBEDDINGS))
    if embeddings is not None and not (head.dtype == embeddings.dtype and torch.equal(head, embeddings)):
        raise UserError(
            f"{holders[LM_HEAD].source}: lm_head.weight differs from the embeddings, to which config.json ties it: "
            'set "tie_word_embeddings": false there to keep both'
        )
    del holders[LM_HEAD].infos[LM_HEAD]


def check_names(config: MGMConfig, shards: list[Shard]) -> None:
    """Raise UserError with a list of the tensors that are missing, unexpected or of the wrong shape."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(info.shape) for name, info in all_infos(shards).items()}
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit the config: " + "; ".join(sorted(problems)))


def load_model(config: MGMConfig, shards: list[Shard]) -> MGMForConditionalGeneration:
    """The model with each tensor in the type of its file, which `from_pretrained` would cast to one for all."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    for shard in shards:
        model.load_state_dict(shard.load(), strict=False, assign=True)  # check_names has compared the names
    return model


def write_shards(shards: list[Shard], folder: Path, rename: Callable[[str], str] = lambda name: name) -> dict:
    """Write the shards, one in memory at a time, and `model.safetensors.index.json`, which is returned."""
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for shard in shards:
        tensors = shard.load()
        tensors = {rename(name): tensors[name].contiguous() for name in shard.infos}
        save_file(tensors, folder / shard.file_name, metadata={"format": "pt"})
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        index["weight_map"] |= dict.fromkeys(tensors, shard.file_name)
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
    return index


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill. It gets its name when all is written; after an error nothing is left of it."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
