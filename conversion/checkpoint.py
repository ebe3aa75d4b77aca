"""A checkpoint as a list of shards: found and renamed, checked against the model, written."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conversion.merge_adapter import AdapterMerger
from conversion.weight_files import TensorInfo, WeightFile, open_weights, tensor_bytes, write_safetensors
from mgm.configuration_mgm import MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from utils import UserError


EMBEDDINGS, LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Shard:
    """A weight file, the file to be made of it, and the tensors taken from it in the order in which they lie there."""

    weights: WeightFile
    file_name: str
    names: dict[str, str]  # ours -> the file's

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {ours: self.weights.tensors[theirs] for ours, theirs in self.names.items()}


def find_shards(files: list[Path], rename: Callable[[str], str | None], tower: str | None = None) -> list[Shard]:
    """Each file with the tensors that `rename` keeps, to be written under its own name or, of a tower, under that."""
    shards = []
    for path in files:
        weights = open_weights(path)
        names = {rename(name): name for name in weights.tensors}
        names.pop(None, None)
        if names:
            shards.append(Shard(weights, path.stem.replace("pytorch_model", "model") + ".safetensors", names))
    if tower is not None:
        return [replace(shard, file_name=_numbered(tower, i, len(shards))) for i, shard in enumerate(shards, start=1)]
    return shards


def _numbered(stem: str, i: int, total: int) -> str:
    return f"{stem}.safetensors" if total == 1 else f"{stem}-{i:05}-of-{total:05}.safetensors"


def all_infos(shards: list[Shard]) -> dict[str, TensorInfo]:
    """Our name of every tensor to its type and shape. Raises UserError for a name that two files have."""
    infos: dict[str, TensorInfo] = {}
    for shard in shards:
        if twice := sorted(infos.keys() & shard.names.keys()):
            raise UserError(f"{shard.weights.path}: another file has the same tensors too: {', '.join(twice)}")
        infos |= shard.infos
    return infos


def embeddings_dtype(infos: dict[str, TensorInfo]) -> torch.dtype:
    return infos[EMBEDDINGS].dtype if EMBEDDINGS in infos else torch.float32


def drop_tied_head(shards: list[Shard], is_tied: bool) -> list[Shard]:
    """Leave out a head that repeats the embeddings. Raises UserError where it differs from what it is tied to."""
    if not is_tied or not any(LM_HEAD in shard.names for shard in shards):
        return shards
    holders = [next((shard for shard in shards if name in shard.names), None) for name in (LM_HEAD, EMBEDDINGS)]
    if holders[1] is not None and not _equal(holders[0], LM_HEAD, holders[1], EMBEDDINGS):
        raise UserError(
            f"{holders[0].weights.path}: lm_head.weight differs from the embeddings, to which config.json ties it: "
            'set "tie_word_embeddings": false there to keep both'
        )
    return [replace(s, names={k: v for k, v in s.names.items() if k != LM_HEAD}) for s in shards]


def _equal(shard: Shard, name: str, other_shard: Shard, other_name: str) -> bool:
    """Whether two tensors are the same bytes, read piece by piece."""
    if shard.infos[name] != other_shard.infos[other_name]:
        return False
    with open_weights(shard.weights.path) as weights, open_weights(other_shard.weights.path) as others:
        pairs = zip(weights.chunks(shard.names[name]), others.chunks(other_shard.names[other_name]), strict=True)
        return all(chunk == other for chunk, other in pairs)


def check_names(config: MGMConfig, infos: dict[str, TensorInfo]) -> None:
    """The tensors are exactly the model's. Raises UserError with a list of those that are not."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"missing {name}" for name in expected.keys() - infos.keys()]
    problems += [f"unexpected {name}" for name in infos.keys() - expected.keys()]
    problems += [
        f"{name} has shape {infos[name].shape}, expected {expected[name]}"
        for name in expected.keys() & infos.keys()
        if infos[name].shape != expected[name]
    ]
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit the config: " + "; ".join(sorted(problems)))


def write_shards(
    shards: list[Shard],
    folder: Path,
    rename: Callable[[str], str] = lambda name: name,
    merger: AdapterMerger | None = None,
) -> tuple[dict[str, str], int]:
    """Write each shard, its tensors renamed and an adapter merged. Returns each tensor's file and all their bytes."""
    weight_map, total_size = {}, 0
    for shard in shards:
        infos = {rename(ours): info for ours, info in shard.infos.items()}
        ours = {rename(name): name for name in shard.names}
        with shard.weights as weights:

            def chunks(name: str, weights=weights, shard=shard, ours=ours) -> Iterator[memoryview]:
                source = shard.names[ours[name]]
                if merger is None or ours[name] not in merger.changed:
                    return weights.chunks(source)
                return iter([tensor_bytes(merger.merge(ours[name], weights.read(source)))])

            write_safetensors(folder / shard.file_name, infos, chunks)
        weight_map |= dict.fromkeys(infos, shard.file_name)
        total_size += sum(info.nbytes for info in infos.values())
    return weight_map, total_size


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is written; after an error nothing is left of it."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
