"""Turn a checkpoint in the original MGM layout into one that transformers loads.

    python convert_mgm.py --from_original MGM-2B --output mgm-2b

Tensors are renamed, never changed, and one shard is in memory at a time.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    ConvNextConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from configuration_mgm import MGMConfig, clip_large_336
from modeling_mgm import MGMForConditionalGeneration
from processing_mgm import MGMProcessor
from utils import UserError, run_script


# The original's names and ours, applied in turn. What matches none is the text backbone's.
TO_OURS = [
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.vision_tower_aux\.vision_stem\.0\.", "model.vision_tower_aux.embeddings.patch_embeddings."),
    (r"^model\.vision_tower_aux\.vision_stem\.1\.", "model.vision_tower_aux.embeddings.layernorm."),
    (
        r"^model\.vision_tower_aux\.vision_stages\.(\d+)\.downsample\.(\d)\.",
        r"model.vision_tower_aux.encoder.stages.\1.downsampling_layer.\2.",
    ),
    (r"^model\.vision_tower_aux\.vision_stages\.(\d+)\.blocks\.", r"model.vision_tower_aux.encoder.stages.\1.layers."),
    (r"^(model\.vision_tower_aux\..*)\.conv_dw\.", r"\1.dwconv."),
    (r"^(model\.vision_tower_aux\..*)\.norm\.", r"\1.layernorm."),
    (r"^(model\.vision_tower_aux\..*)\.mlp\.fc(\d)\.", r"\1.pwconv\2."),
    (r"^(model\.vision_tower_aux\..*)\.gamma$", r"\1.layer_scale_parameter"),
    (r"^model\.vlm_uni_query_projector\.", "model.patch_info_mining.query_proj."),
    (r"^model\.vlm_uni_aux_projector\.", "model.patch_info_mining.key_proj."),
    (r"^model\.vlm_uni_val_projector\.", "model.patch_info_mining.value_proj."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
]
# OpenCLIP keeps the ConvNeXt trunk under visual.trunk; the original MGM gives it the names of the left column above.
OPEN_CLIP_TO_ORIGINAL = [
    (r"^visual\.trunk\.stem\.", "model.vision_tower_aux.vision_stem."),
    (r"^visual\.trunk\.stages\.", "model.vision_tower_aux.vision_stages."),
]


@dataclass(kw_only=True)
class ConvertConfig:
    from_original: str | None = field(default=None, metadata={"help": "folder of the original checkpoint"})
    output: str | None = field(default=None, metadata={"help": "new folder to write"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP's folder, if not inside or beside"})
    vision_tower_aux: str | None = field(default=None, metadata={"help": "ConvNeXt's folder, if not inside or beside"})

    def __post_init__(self) -> None:
        if self.from_original is None or self.output is None:
            raise UserError("give --from_original DIR and --output DIR")
        if not (Path(self.from_original) / "config.json").is_file():
            raise UserError(f"--from_original {self.from_original}: there is no config.json in it")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output} exists: choose a new folder")


@dataclass(frozen=True)
class Shard:
    """One weight file and the new name of each tensor that is taken from it."""

    path: Path
    names: dict[str, str]  # ours -> the file's


def main(config: ConvertConfig) -> dict:
    source, output = Path(config.from_original), Path(config.output)
    original = json.loads((source / "config.json").read_text())
    shards = find_shards(source, rename_original)
    if not any(name.startswith("model.vision_tower_aux.") for shard in shards for name in shard.names):
        shards += find_shards(find_tower(source, original, "mm_vision_tower_aux", config), rename_open_clip)
    shapes = read_shapes(shards)

    tokenizer = AutoTokenizer.from_pretrained(source)
    mgm_config = build_config(original, shapes, find_tower(source, original, "mm_vision_tower", config), tokenizer)
    check_names(mgm_config, shapes)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        total_size, dtype = write_shards(shards, partial)
        mgm_config.dtype = dtype
        mgm_config.architectures = [MGMForConditionalGeneration.__name__]
        mgm_config.save_pretrained(partial)
        build_generation_config(tokenizer).save_pretrained(partial)
        build_processor(mgm_config, tokenizer, original.get("image_aspect_ratio", "pad")).save_pretrained(partial)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial)
        raise
    print(f"{len(shapes)} tensors, {total_size:,} bytes in {len(shards)} files: {output}")
    return {"status": "done", "output": str(output), "tensors": len(shapes), "total_size": total_size}


def rename_original(name: str) -> str | None:
    """The original's name of a tensor to ours; None for one that is not kept (a tied head, a rotary buffer)."""
    if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or name.endswith("position_ids"):
        return None
    return _substitute(name, TO_OURS)


def rename_open_clip(name: str) -> str | None:
    """A name inside an OpenCLIP checkpoint to ours; None for all but the image trunk."""
    return rename_original(_substitute(name, OPEN_CLIP_TO_ORIGINAL)) if name.startswith("visual.trunk.st") else None


def _substitute(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def find_tower(source: Path, original: dict, key: str, config: ConvertConfig) -> Path | None:
    """A tower's folder: the one given, else the config's path inside or beside the checkpoint, or from here."""
    given = getattr(config, key.removeprefix("mm_"))
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"--{key.removeprefix('mm_')} {given}: no such folder")
        return Path(given)
    name = original[key]
    roots = [source, source.parent, source.parent / "towers", Path()]
    candidates = [root / path for root in roots for path in (name, Path(name).name)]
    return next((path for path in candidates if path.is_dir()), None)


def find_shards(folder: Path | None, rename: Callable[[str], str | None]) -> list[Shard]:
    """Every weight file of a folder with the tensors to keep from it; safetensors are preferred to .bin."""
    if folder is None:
        raise UserError(
            "the checkpoint holds no ConvNeXt weights and its tower is not beside it: give --vision_tower_aux DIR"
        )
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"{folder}: there is no *.safetensors or *.bin in it")
    shards = []
    for path in files:
        with open_weights(path) as weights:
            renamed = {rename(name): name for name in weights.keys()}  # noqa: SIM118 (not a dict)
        renamed.pop(None, None)
        if renamed:
            shards.append(Shard(path, renamed))
    return shards


def open_weights(path: Path):
    """A context with `keys()`, `get_tensor(name)`; .bin files are read with weights only, never unpickled freely."""
    return safe_open(path, framework="pt") if path.suffix == ".safetensors" else _TorchFile(path)


class _TorchFile:
    """safe_open's interface over a .bin file."""

    def __init__(self, path: Path) -> None:
        self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def __enter__(self) -> "_TorchFile":
        return self

    def __exit__(self, *_) -> None:
        self.tensors = {}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> "_TorchFile._Slice":
        return self._Slice(self.tensors[name])

    class _Slice:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def get_shape(self) -> list[int]:
            return list(self.tensor.shape)


def read_shapes(shards: list[Shard]) -> dict[str, tuple[int, ...]]:
    """Our name of every tensor to its shape, from the files' headers."""
    shapes = {}
    for shard in shards:
        with open_weights(shard.path) as weights:
            shapes |= {ours: tuple(weights.get_slice(theirs).get_shape()) for ours, theirs in shard.names.items()}
    return shapes


def build_config(
    original: dict, shapes: dict[str, tuple[int, ...]], clip_folder: Path | None, tokenizer: PreTrainedTokenizerBase
) -> MGMConfig:
    """The original's config.json, CLIP's own, and ConvNeXt's as its tensors tell it."""
    return MGMConfig(
        text_config=text_config(original),
        vision_config=clip_config(original, clip_folder),
        vision_config_aux=convnext_config(shapes, original["image_size_aux"]),
        image_token_id=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_config(original: dict) -> PreTrainedConfig:
    """The text backbone's part of the original's flat config: mgm_gemma -> gemma."""
    model_type = original["model_type"].removeprefix("mgm_")
    default = AutoConfig.for_model(model_type)
    known = {key: original[key] for key in default.to_dict() if key in original and key != "model_type"}
    if "rope_theta" in original:
        known["rope_parameters"] = {"rope_type": "default", "rope_theta": original["rope_theta"]}
    known.pop("architectures", None)
    return AutoConfig.for_model(model_type, **known)


def clip_config(original: dict, folder: Path | None) -> CLIPVisionConfig:
    if folder is not None:
        return CLIPVisionConfig.from_pretrained(folder)
    if Path(original["mm_vision_tower"]).name == "clip-vit-large-patch14-336":
        return clip_large_336()
    raise UserError(f"the tower {original['mm_vision_tower']} is not beside the checkpoint: give --vision_tower DIR")


def convnext_config(shapes: dict[str, tuple[int, ...]], image_size: int) -> ConvNextConfig:
    """Widths and depths as the tensors have them; every OpenCLIP ConvNeXt takes 4x4 patches."""
    stages = "model.vision_tower_aux.encoder.stages"
    blocks = [re.fullmatch(rf"{stages}\.(\d+)\.layers\.(\d+)\.dwconv\.bias", name) for name in shapes]
    blocks = [(int(match[1]), int(match[2])) for match in blocks if match]
    depths = [sum(stage == i for stage, _ in blocks) for i in range(4)]
    hidden_sizes = [shapes[f"{stages}.{i}.layers.0.dwconv.bias"][0] for i in range(4)]
    return ConvNextConfig(hidden_sizes=hidden_sizes, depths=depths, image_size=image_size, layer_norm_eps=1e-6)


def check_names(config: MGMConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """The tensors are exactly the model's. Raises UserError with a list of those that are not."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"missing {name}" for name in expected.keys() - shapes.keys()]
    problems += [f"unexpected {name}" for name in shapes.keys() - expected.keys()]
    problems += [
        f"{name} has shape {shapes[name]}, expected {expected[name]}"
        for name in expected.keys() & shapes.keys()
        if shapes[name] != expected[name]
    ]
    if problems:
        raise UserError(f"{len(problems)} tensors do not fit the config: " + "; ".join(sorted(problems)))


def write_shards(shards: list[Shard], output: Path) -> tuple[int, torch.dtype]:
    """Write each shard under our names, and the index. Returns the bytes of all tensors and the embeddings' dtype."""
    weight_map, total_size, dtype = {}, 0, torch.float32
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        with open_weights(shard.path) as weights:
            tensors = {ours: weights.get_tensor(theirs).contiguous() for ours, theirs in shard.names.items()}
        save_file(tensors, output / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        if "model.language_model.embed_tokens.weight" in tensors:
            dtype = tensors["model.language_model.embed_tokens.weight"].dtype
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return total_size, dtype


def build_generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A reply ends with <end_of_turn> as well as with <eos>."""
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    eos_token_id = [tokenizer.eos_token_id] + ([end_of_turn] if end_of_turn is not None else [])
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def build_processor(
    config: MGMConfig, tokenizer: PreTrainedTokenizerBase, image_aspect_ratio: str = "pad"
) -> MGMProcessor:
    """The processor for a model: CLIP's preprocessing at the auxiliary tower's size."""
    side = config.vision_config_aux.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return MGMProcessor(
        image_processor,
        tokenizer,
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_aspect_ratio=image_aspect_ratio,
    )


if __name__ == "__main__":
    run_script(main, ConvertConfig)
