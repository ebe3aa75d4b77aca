"""The two vision towers: where their folders are, and their weights from there."""

from dataclasses import replace
from pathlib import Path

from conversion.names import rename_clip, rename_open_clip
from conversion.shards import Shard, find_shards
from conversion.weight_files import find_open_clip_files, find_weight_files
from utils import UserError


CLIP, CONVNEXT = TOWERS = ("vision_tower", "vision_tower_aux")  # modules, flags and file names alike


def find_tower(source: Path, original: dict, flag: str, given: str | None) -> Path | None:
    """A tower's folder: the one given, else the config's path inside or beside the checkpoint, or from here."""
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"--{flag} {given}: no such folder")
        return Path(given)
    name = original[f"mm_{flag}"]
    roots = [source, source.parent, source.parent / "towers", Path()]
    candidates = [root / path for root in roots for path in (name, Path(name).name)]
    return next((path for path in candidates if path.is_dir()), None)


def tower_shards(flag: str, folder: Path | None) -> list[Shard]:
    """A tower's weights from its own folder, for files of their own."""
    if folder is None:
        raise UserError(f"the checkpoint holds no {flag} weights and the tower is not beside it: give --{flag} DIR")
    if flag == CLIP:
        shards = find_shards(find_weight_files(folder), rename_clip)
    else:
        shards = find_shards(find_open_clip_files(folder), rename_open_clip)
    if not shards:
        raise UserError(f"--{flag} {folder}: its files hold no {'CLIP' if flag == CLIP else 'OpenCLIP ConvNeXt'}")
    if len(shards) == 1:
        return [replace(shards[0], file_name=f"{flag}.safetensors")]
    return [replace(s, file_name=f"{flag}-{i:05}-of-{len(shards):05}.safetensors") for i, s in enumerate(shards, 1)]


def holds_tower(shards: list[Shard], flag: str) -> bool:
    return any(name.startswith(f"model.{flag}.") for shard in shards for name in shard.infos)


def drop_own_files(shards: list[Shard], changed_towers: list[str]) -> list[Shard]:
    """Leave out files of a tower alone, which the original reads in the tower's folder, unless it has changed."""
    return [
        shard
        for shard in shards
        if not shard.file_name.startswith(TOWERS) or any(holds_tower([shard], flag) for flag in changed_towers)
    ]
