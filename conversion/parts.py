"""The parts that a checkpoint may lack: towers from their own folders, a new projector and mining."""

from pathlib import Path

import torch

from conversion.names import rename_clip, rename_open_clip
from conversion.shards import Shard, empty_model, read_shards
from conversion.weight_files import find_open_clip_files, find_weight_files
from mgm.configuration_mgm import MGMConfig
from utils import UserError


CLIP, CONVNEXT = TOWERS = ("vision_tower", "vision_tower_aux")  # modules, flags and file names alike
CONNECTOR = ("multi_modal_projector", "patch_info_mining")
CONNECTOR_FILE, CONNECTOR_SEED = "projector_and_mining.safetensors", 0


def find_tower(flag: str, given: str | None, source: Path, name: str) -> Path | None:
    """A tower's folder: the one given, else the config's path inside or beside the checkpoint, or from here."""
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"--{flag} {given}: no such folder")
        return Path(given)
    roots = [source, source.parent, source.parent / "towers", Path()]
    candidates = [root / path for root in roots for path in (name, Path(name).name)]
    return next((path for path in candidates if path.is_dir()), None)


def tower_shards(flag: str, folder: Path | None) -> list[Shard]:
    """A tower's weights from its own folder, for files of their own."""
    if folder is None:
        raise UserError(f"the checkpoint holds no {flag} weights and the tower is not beside it: give --{flag} DIR")
    if flag == CLIP:
        shards = read_shards(find_weight_files(folder), rename_clip, tower=flag)
    else:
        shards = read_shards(find_open_clip_files(folder), rename_open_clip, tower=flag)
    if not shards:
        raise UserError(f"--{flag} {folder}: its files hold no {'CLIP' if flag == CLIP else 'OpenCLIP ConvNeXt'}")
    return shards


def new_connector(config: MGMConfig, dtype: torch.dtype) -> Shard:
    """Projector and mining as the model itself initializes them."""
    model = empty_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONNECTOR_SEED)
        for name in CONNECTOR:
            model.model.get_submodule(name).to_empty(device="cpu").apply(model._init_weights)
    print(f"Projector and patch info mining are new: drawn with seed {CONNECTOR_SEED}")
    tensors = {name: x.to(dtype) for name, x in model.state_dict().items() if name.split(".")[1] in CONNECTOR}
    return Shard(Path(CONNECTOR_FILE), CONNECTOR_FILE, tensors)
