"""Turn a checkpoint in the original MGM's layout into one that transformers loads, turn one back, put one together.

    python convert_mgm.py --from_original MGM-2B --output mgm-2b
    python convert_mgm.py --to_original mgm-2b --adapter outputs/mine --output MGM-2B-mine
    python convert_mgm.py --assemble --llm gemma-2b-it --vision_tower CLIP --vision_tower_aux CONVNEXT --output start

Tensors are renamed, never changed (an adapter's merging aside), and go from file to file one at a time. The way back
leaves out a tower that came from a folder of its own: the original reads it there.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from conversion.checkpoint import (
    Shard,
    all_infos,
    check_names,
    drop_tied_head,
    embeddings_dtype,
    find_shards,
    new_folder,
    write_shards,
)
from conversion.merge_adapter import AdapterMerger
from conversion.names import rename_clip, rename_open_clip, rename_original, rename_ours
from conversion.original_config import MODEL_TYPES, clip_config, convnext_config, derive_original, text_config
from conversion.original_files import ORIGINAL_FILES, hand_back_files, keep_original_files
from conversion.weight_files import TensorInfo, find_open_clip_files, find_weight_files, read_json, write_index
from mgm.chat_templates import build_generation_config
from mgm.configuration_mgm import MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from mgm.processing_mgm import MGMProcessor, build_processor
from models.adapter import load_trained_processor
from models.loading import load_config
from utils import UserError, run_script


CLIP, CONVNEXT = "vision_tower", "vision_tower_aux"  # modules, flags and file names alike
CONNECTOR = ("multi_modal_projector", "patch_info_mining")
CONNECTOR_FILE, CONNECTOR_SEED = "projector_and_mining.safetensors", 0


@dataclass(kw_only=True)
class ConvertConfig:
    from_original: str | None = field(default=None, metadata={"help": "folder of the original checkpoint"})
    to_original: str | None = field(default=None, metadata={"help": "folder of a converted or fully trained model"})
    assemble: bool = field(default=False, metadata={"help": "a model for stage 1 from --llm and the two towers"})
    output: str | None = field(default=None, metadata={"help": "new folder to write"})
    adapter: str | None = field(default=None, metadata={"help": "adapter's folder, to be merged by --to_original"})
    llm: str | None = field(default=None, metadata={"help": "language model's folder, for --assemble"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP's folder, if not inside or beside"})
    vision_tower_aux: str | None = field(default=None, metadata={"help": "ConvNeXt's folder, if not inside or beside"})

    def __post_init__(self) -> None:
        if (self.from_original is not None) + (self.to_original is not None) + self.assemble != 1:
            raise UserError("give --from_original DIR, --to_original DIR or --assemble: exactly one of the three")
        if self.output is None:
            raise UserError("give --output DIR")
        self.check_companions()
        for flag in ("from_original", "to_original", "llm"):
            folder = getattr(self, flag)
            if folder is not None and not (Path(folder) / "config.json").is_file():
                raise UserError(f"--{flag} {folder}: there is no config.json in it")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists: choose a new folder")

    def check_companions(self) -> None:
        """Raise UserError for a flag that the chosen direction lacks, or has no use for."""
        towers = (CLIP, CONVNEXT)
        if self.assemble and (missing := [name for name in ("llm", *towers) if getattr(self, name) is None]):
            raise UserError(f"--assemble needs more: give {', '.join(f'--{name} DIR' for name in missing)}")
        useless = {"from_original": ("llm", "adapter"), "to_original": ("llm", *towers), "assemble": ("adapter",)}
        direction = next(name for name in useless if getattr(self, name))
        for name in useless[direction]:
            if getattr(self, name) is not None:
                raise UserError(f"--{name} {getattr(self, name)}: --{direction} has no use for it, leave it out")


def main(config: ConvertConfig) -> dict:
    if config.assemble:
        return assemble(config)
    return from_original(config) if config.from_original is not None else to_original(config)


def from_original(config: ConvertConfig) -> dict:
    """The original's checkpoint in our layout, a tower that it lacks from the tower's own folder."""
    source = Path(config.from_original)
    original = read_original(source)
    folders = {flag: find_tower(source, original, flag, getattr(config, flag)) for flag in (CLIP, CONVNEXT)}
    backbone = text_config(original)
    shards = find_shards(find_weight_files(source), rename_original)
    for flag, folder in folders.items():
        if not any(name.startswith(f"model.{flag}.") for shard in shards for name in shard.names):
            shards += tower_shards(flag, folder)
    shards = drop_tied_head(shards, backbone.tie_word_embeddings)
    image_size, infos = original.get("image_size_aux", 320), all_infos(shards)
    mgm_config = joint_config(
        text_config=backbone,
        vision_config=clip_config(original["mm_vision_tower"], folders[CLIP]),
        vision_config_aux=convnext_config(infos, image_size, folders[CONVNEXT]),
        image_grid=original.get("image_grid", 1),
        image_global=original.get("image_global", False),
        original_config=original,
    )
    check_names(mgm_config, infos)
    return write_ours(config.output, mgm_config, shards, source, original.get("image_aspect_ratio", "pad"))


def assemble(config: ConvertConfig) -> dict:
    """A language model and two towers as an MGM whose projector and mining are new."""
    llm = Path(config.llm)
    model_type = read_json(llm / "config.json").get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"--llm {llm}: a {model_type} cannot be MGM's: choose {', '.join(MODEL_TYPES)}")
    backbone = AutoConfig.from_pretrained(llm, architectures=None)
    shards = find_shards(find_weight_files(llm), rename_original)
    for flag in (CLIP, CONVNEXT):
        shards += tower_shards(flag, find_tower(llm, {}, flag, getattr(config, flag)))
    shards = drop_tied_head(shards, backbone.tie_word_embeddings)
    infos = all_infos(shards)
    mgm_config = joint_config(
        text_config=backbone,
        vision_config=clip_config(config.vision_tower, Path(config.vision_tower)),
        vision_config_aux=convnext_config(infos, 768, Path(config.vision_tower_aux)),
    )
    connector = new_connector(mgm_config, embeddings_dtype(infos))
    check_names(mgm_config, infos | {name: TensorInfo(x.dtype, tuple(x.shape)) for name, x in connector.items()})
    print(f"Projector and patch info mining are new: drawn with seed {CONNECTOR_SEED}")
    return write_ours(config.output, mgm_config, shards, llm, "pad", connector)


def to_original(config: ConvertConfig) -> dict:
    """Our folder in the original's layout, an adapter merged."""
    source, output = Path(config.to_original), Path(config.output)
    if "text_config" not in read_json(source / "config.json"):
        raise UserError(f"--to_original {source}: it is no folder made by convert_mgm.py or train.py --lora_r 0")
    mgm_config = load_config(str(source))
    shards = drop_tied_head(find_shards(find_weight_files(source), lambda name: name), mgm_config.tie_word_embeddings)
    infos = all_infos(shards)
    check_names(mgm_config, infos)
    merger = AdapterMerger(mgm_config, Path(config.adapter)) if config.adapter is not None else None
    shards = shards_to_hand_back(shards, merger)
    with new_folder(output) as partial:
        weight_map, total_size = write_shards(shards, partial, rename_ours, merger)
        write_index(partial, weight_map, total_size)
        processor = load_trained_processor(str(source), config.adapter)
        original = original_config(source, mgm_config, embeddings_dtype(infos), processor)
        if merger is not None and any(name.startswith(f"model.{CONVNEXT}.") for name in merger.changed):
            original["optimize_vision_tower_aux"] = True  # the original takes it from the tower's folder otherwise
        (partial / "config.json").write_text(json.dumps(original, indent=2, sort_keys=True) + "\n")
        hand_back_files(source, partial)
    return report(output, len(weight_map), total_size, len(shards))


def read_original(folder: Path) -> dict:
    """The original's config.json. Raises UserError where it is another model's."""
    original = read_json(folder / "config.json")
    if "text_config" in original:
        raise UserError(f"--from_original {folder}: it is in transformers' layout already")
    for key in ("model_type", "mm_vision_tower", "mm_vision_tower_aux"):
        if key not in original:
            raise UserError(f"--from_original {folder}: its config.json has no {key}, so it is no MGM's")
    return original


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
        shards = find_shards(find_weight_files(folder), rename_clip, tower=flag)
    else:
        shards = find_shards(find_open_clip_files(folder), rename_open_clip, tower=flag)
    if not shards:
        raise UserError(f"--{flag} {folder}: its files hold no {'CLIP' if flag == CLIP else 'OpenCLIP ConvNeXt'}")
    return shards


def joint_config(**parts) -> MGMConfig:
    try:
        return MGMConfig(**parts)
    except ValueError as error:
        raise UserError(f"the parts do not fit together: {error}") from None


def new_connector(config: MGMConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Projector and mining as the model itself draws them, by name."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONNECTOR_SEED)
        for name in CONNECTOR:
            model.model.get_submodule(name).to_empty(device="cpu").apply(model._init_weights)
    tensors = {name: parameter for name, parameter in model.named_parameters() if name.split(".")[1] in CONNECTOR}
    return {name: parameter.detach().to(dtype) for name, parameter in tensors.items()}


def write_ours(
    output: str,
    config: MGMConfig,
    shards: list[Shard],
    source: Path,
    image_aspect_ratio: str,
    connector: dict[str, torch.Tensor] | None = None,
) -> dict:
    """A folder for transformers: shards (and a new connector), configs, the processor over `source`'s tokenizer."""
    shards = with_index_names(shards, len(shards) + bool(connector))
    with new_folder(Path(output)) as partial:
        keep_original_files(source, partial)
        processor = complete_config(
            config, load_tokenizer(source), embeddings_dtype(all_infos(shards)), image_aspect_ratio
        )
        weight_map, total_size = write_shards(shards, partial)
        if connector is not None:
            save_file(connector, partial / CONNECTOR_FILE, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(connector, CONNECTOR_FILE)
            total_size += sum(tensor.nbytes for tensor in connector.values())
        write_index(partial, weight_map, total_size)
        config.save_pretrained(partial)
        build_generation_config(processor.tokenizer).save_pretrained(partial)
        processor.save_pretrained(partial)
    return report(Path(output), len(weight_map), total_size, len(set(weight_map.values())))


def with_index_names(shards: list[Shard], num_files: int) -> list[Shard]:
    """transformers takes a `model.safetensors` for the whole model: beside other files it needs another name."""
    if num_files == 1:
        return shards
    names = {"model.safetensors": "model-00001-of-00001.safetensors"}
    return [replace(shard, file_name=names.get(shard.file_name, shard.file_name)) for shard in shards]


def shards_to_hand_back(shards: list[Shard], merger: AdapterMerger | None) -> list[Shard]:
    """All but the towers' own files, which the original reads in their folders, unless an adapter changes them."""
    changed = merger.changed if merger is not None else set()
    kept = [s for s in shards if not s.file_name.startswith(CLIP) or changed & s.names.keys()]
    if len(kept) == 1 and kept[0].file_name == "model-00001-of-00001.safetensors":  # see with_index_names
        return [replace(kept[0], file_name="model.safetensors")]
    return kept


def original_config(folder: Path, config: MGMConfig, dtype: torch.dtype, processor: MGMProcessor) -> dict:
    """config.json as the original had it; one of a model trained since then with its type, of another one derived.

    `processor`: what the model was trained with last, which may have had another image_aspect_ratio.
    """
    if config.original_config is None:
        length = processor.tokenizer.model_max_length
        return derive_original(config, dtype, processor.image_aspect_ratio, length if length < 2**31 else 2048)
    original = dict(config.original_config)
    if processor.image_aspect_ratio != original.get("image_aspect_ratio", "pad"):
        original["image_aspect_ratio"] = processor.image_aspect_ratio
    if (folder / ORIGINAL_FILES).is_dir():
        return original
    return original | {"torch_dtype": str(dtype).removeprefix("torch.")}


def complete_config(
    config: MGMConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, image_aspect_ratio: str
) -> MGMProcessor:
    """Fill in what the tokenizer decides. Returns the processor."""
    processor = build_processor(config, tokenizer, image_aspect_ratio)
    config.image_token_id = processor.image_token_id
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.dtype = dtype
    config.architectures = [MGMForConditionalGeneration.__name__]
    return processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({error})") from None


def report(output: Path, num_tensors: int, total_size: int, num_files: int) -> dict:
    print(f"{num_tensors} tensors, {total_size:,} bytes in {num_files} files: {output}")
    return {"status": "done", "output": str(output), "tensors": num_tensors, "total_size": total_size}


if __name__ == "__main__":
    run_script(main, ConvertConfig)
