"""A checkpoint as a list of shards: read and renamed, checked against the model, written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from conversion.weight_files import Tensors, read_weights
from mgm.configuration_mgm import MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from utils import UserError


EMBEDDINGS, LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# transformers takes a `model.safetensors` for the whole model: beside other files it needs another name.
ALONE, BESIDE_OTHERS = "model.safetensors", "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Shard:
    """A file of weights to be written."""

    source: Path
    file_name: str
    tensors: Tensors  # mapped from `source`: they take memory once they are written

    @property
    def modules(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self.tensors}


def read_shards(files: list[Path], rename: Callable[[str], str | None], tower: str | None = None) -> list[Shard]:
    """A shard for each file that has tensors for which `rename` returns a name.

    Shards keep the name of their file, or are named after `tower`.
    """
    shards = []
    for path in files:
        tensors = {rename(name): tensor for name, tensor in read_weights(path).items()}
        tensors.pop(None, None)
        if tensors:
            name = path.stem.replace("pytorch_model", "model")
            if tower is not None:
                name = f"{tower}-{name}" if len(files) > 1 else tower
            shards.append(Shard(path, f"{name}.safetensors", tensors))
    return shards


def all_tensors(shards: list[Shard]) -> Tensors:
    """Raises UserError for a name that two files have."""
    tensors: Tensors = {}
    for shard in shards:
        if twice := sorted(tensors.keys() & shard.tensors.keys()):
            raise UserError(f"{shard.source}: another file has the same tensors too: {', '.join(twice)}")
        tensors |= shard.tensors
    return tensors


def embeddings_dtype(tensors: Tensors) -> torch.dtype:
    return tensors[EMBEDDINGS].dtype if EMBEDDINGS in tensors else torch.float32


def drop_tied_head(shards: list[Shard], is_tied: bool) -> None:
    """Leave out a head that repeats the embeddings. Raises UserError where it differs from what it is tied to."""
    holder = next((shard for shard in shards if LM_HEAD in shard.tensors), None)
    if not is_tied or holder is None:
        return
    del holder.tensors[LM_HEAD]
    head = read_weights(holder.source)[LM_HEAD]  # mapped anew, so that its pages are freed when it is compared
    embeddings = all_tensors(shards).get(EMBEDDINGS, head)
    if head.dtype != embeddings.dtype or not torch.equal(head, embeddings):
        raise UserError(
            f"{holder.source}: lm_head.weight differs from the embeddings, to which config.json ties it: "
            'set "tie_word_embeddings": false there to keep both'
        )


def empty_model(config: MGMConfig) -> MGMForConditionalGeneration:
    with torch.device("meta"):
        return MGMForConditionalGeneration(config)


def check_names(config: MGMConfig, tensors: Tensors) -> None:
    """Raise UserError with a list of the tensors that are missing, unexpected or of the wrong shape."""
    expected = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit the config: " + "; ".join(sorted(problems)))


def write_shards(shards: list[Shard], folder: Path, rename: Callable[[str], str] = lambda name: name) -> dict:
    """Write the shards and `model.safetensors.index.json`, which is returned. Each written shard is emptied."""
    file_names = {ALONE: BESIDE_OTHERS} if len(shards) > 1 else {BESIDE_OTHERS: ALONE}
    weight_map, total_size = {}, 0
    for shard in shards:
        tensors = {rename(name): tensor.contiguous() for name, tensor in shard.tensors.items()}
        file_name = file_names.get(shard.file_name, shard.file_name)
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        shard.tensors.clear()  # closes the mapped file, whose pages count as memory
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
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
