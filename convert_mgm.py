"""Convert a checkpoint of the original MGM to transformers' layout, convert one back, or assemble one from its parts.

    python convert_mgm.py --from_original MGM-2B --output mgm-2b
    python convert_mgm.py --to_original mgm-2b --adapter outputs/mine --output MGM-2B-mine
    python convert_mgm.py --assemble --llm gemma-2b-it --vision_tower CLIP --vision_tower_aux CONVNEXT --output start

Tensors are renamed, never changed (unless an adapter is merged). One file of weights is in memory at a time, or the
model where an adapter is merged. The way back leaves out a tower that came from a folder of its own: the original
reads it there.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

from transformers import AutoConfig, PreTrainedConfig

from conversion.merge_adapter import changed_modules, merge_adapter
from conversion.names import rename_original, rename_ours
from conversion.original_config import MODEL_TYPES, joint_config, original_config, read_original, text_config
from conversion.original_files import hand_back_files
from conversion.our_folder import write_our_folder
from conversion.parts import CONVNEXT, TOWERS, find_tower, new_connector, tower_shards
from conversion.shards import (
    Shard,
    all_tensors,
    check_names,
    drop_tied_head,
    embeddings_dtype,
    empty_model,
    new_folder,
    read_shards,
    write_shards,
)
from conversion.weight_files import find_weight_files, read_json
from mgm.configuration_mgm import MGMConfig
from models.adapter import load_trained_processor
from models.loading import load_config
from utils import UserError, flag, run_script


# The flags that each direction takes beside --output.
COMPANIONS = {"from_original": TOWERS, "to_original": ("adapter",), "assemble": ("llm", *TOWERS)}


@dataclass(kw_only=True)
class ConvertConfig:
    from_original: str | None = flag(None, "convert this folder, a checkpoint of the original")
    to_original: str | None = flag(None, "convert this folder back, a converted or fully trained model")
    assemble: bool = flag(False, "make a model for stage 1 from --llm and the two towers")
    output: str | None = flag(None, "new folder to write")
    adapter: str | None = flag(None, "for --to_original: folder of an adapter to merge")
    llm: str | None = flag(None, "for --assemble: folder of the language model")
    vision_tower: str | None = flag(None, "CLIP's folder; default: the one in or beside the checkpoint")
    vision_tower_aux: str | None = flag(None, "ConvNeXt's folder; default: the one in or beside the checkpoint")

    def __post_init__(self) -> None:
        directions = [name for name in COMPANIONS if getattr(self, name)]
        if len(directions) != 1:
            raise UserError("give --from_original DIR, --to_original DIR or --assemble: exactly one of the three")
        if self.output is None:
            raise UserError("give --output DIR")
        values = {name: getattr(self, name) for name in ("adapter", "llm", *TOWERS)}
        for name, value in values.items():
            if value is not None and name not in COMPANIONS[directions[0]]:
                raise UserError(f"--{name} {value}: --{directions[0]} has no use for it, leave it out")
        missing = [f"--{name} DIR" for name in COMPANIONS["assemble"] if values[name] is None]
        if self.assemble and missing:
            raise UserError(f"--assemble needs more: give {', '.join(missing)}")
        for name in ("from_original", "to_original", "llm"):
            folder = getattr(self, name)
            if folder is not None and not (Path(folder) / "config.json").is_file():
                raise UserError(f"--{name} {folder}: there is no config.json in it")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists: choose a new folder")


def main(config: ConvertConfig) -> dict:
    if config.assemble:
        index = assemble(config)
    else:
        index = from_original(config) if config.from_original is not None else to_original(config)
    num_tensors, total_size = len(index["weight_map"]), index["metadata"]["total_size"]
    num_files = len(set(index["weight_map"].values()))
    print(f"{num_tensors} tensors, {total_size:,} bytes in {num_files} files: {config.output}")
    return {"status": "done", "output": config.output, "tensors": num_tensors, "total_size": total_size}


def from_original(config: ConvertConfig) -> dict:
    """Write the original's checkpoint in our layout. A tower that it lacks comes from the tower's own folder."""
    source = Path(config.from_original)
    original = read_original(source)
    shards, mgm_config = read_parts(config, source, text_config(original), original)
    return write_our_folder(Path(config.output), mgm_config, shards, source, original.get("image_aspect_ratio", "pad"))


def assemble(config: ConvertConfig) -> dict:
    """Write an MGM made of a language model, two towers, and a new projector and mining."""
    llm = Path(config.llm)
    model_type = read_json(llm / "config.json").get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"--llm {llm}: a {model_type} cannot be MGM's: choose {', '.join(MODEL_TYPES)}")
    shards, mgm_config = read_parts(config, llm, AutoConfig.from_pretrained(llm, architectures=None))
    shards.append(new_connector(mgm_config, embeddings_dtype(all_tensors(shards))))
    return write_our_folder(Path(config.output), mgm_config, shards, llm, "pad")


def read_parts(
    config: ConvertConfig, source: Path, backbone: PreTrainedConfig, original: dict | None = None
) -> tuple[list[Shard], MGMConfig]:
    """The shards of `source` and of the towers that it lacks, and the config of the model that they make."""
    paths = original or {}
    towers = {name: find_tower(name, getattr(config, name), source, paths.get(f"mm_{name}", "")) for name in TOWERS}
    shards = read_shards(find_weight_files(source), rename_original)
    for tower, folder in towers.items():
        if not any(name.startswith(f"model.{tower}.") for name in all_tensors(shards)):
            shards += tower_shards(tower, folder)
    drop_tied_head(shards, backbone.tie_word_embeddings)
    return shards, joint_config(backbone, *towers.values(), all_tensors(shards), original)


def to_original(config: ConvertConfig) -> dict:
    """Write our folder in the original's layout, an adapter merged."""
    source = Path(config.to_original)
    if "text_config" not in read_json(source / "config.json"):
        raise UserError(f"--to_original {source}: it is no folder made by convert_mgm.py or train.py --lora_r 0")
    mgm_config = load_config(str(source))
    shards = read_shards(find_weight_files(source), lambda name: name)
    drop_tied_head(shards, mgm_config.tie_word_embeddings)
    check_names(mgm_config, all_tensors(shards))
    processor = load_trained_processor(str(source), config.adapter)
    original = original_config(source, mgm_config, embeddings_dtype(all_tensors(shards)), processor)
    changed: set[str] = set()
    if config.adapter is not None:
        model = empty_model(mgm_config)
        # Unlike from_pretrained, it keeps each tensor's own type. A tied head has no tensor, so it is not strict.
        model.load_state_dict(all_tensors(shards), strict=False, assign=True)
        merged, changed = merge_adapter(model, Path(config.adapter)), changed_modules(Path(config.adapter))
        shards = [replace(shard, tensors={name: merged[name] for name in shard.tensors}) for shard in shards]
    # The original reads a tower in the tower's folder, unless the adapter has changed it.
    shards = [s for s in shards if not s.file_name.startswith(TOWERS) or s.modules & changed]
    if any(path.startswith(f"model.{CONVNEXT}.") for path in changed):
        original["optimize_vision_tower_aux"] = True  # the original reads ConvNeXt from the checkpoint only then
    with new_folder(Path(config.output)) as partial:
        index = write_shards(shards, partial, rename_ours)
        (partial / "config.json").write_text(json.dumps(original, indent=2, sort_keys=True) + "\n")
        hand_back_files(source, partial)
    return index


if __name__ == "__main__":
    run_script(main, ConvertConfig)
