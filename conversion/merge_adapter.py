"""Merge a PEFT adapter into a model that is never in memory as a whole: a tensor comes, its merged form goes."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from mgm.configuration_mgm import MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from utils import UserError


ADAPTER = "default"


class AdapterMerger:
    """A model on the meta device with an adapter whose tensors are real. The arithmetic is PEFT's own.

    Raises:
        UserError: the folder holds no LoRA adapter, or one whose tensors do not all fit the model.
    """

    def __init__(self, config: MGMConfig, folder: Path) -> None:
        model = load_adapter(config, folder)
        self.layers: dict[str, LoraLayer] = {}  # by their weight's name
        self.replacements: dict[str, torch.Tensor] = {}  # what the adapter brings in whole
        for path, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                self.layers[f"{path}.weight"] = module
                if module.lora_bias[ADAPTER]:
                    raise UserError(f"--adapter {folder}: LoRA with biases of its own (lora_bias) cannot be merged")
        for name, parameter in model.get_base_model().named_parameters():
            plain = name.replace(f"modules_to_save.{ADAPTER}.", "").replace("base_layer.", "")
            if not parameter.is_meta and plain not in self.layers and not is_lora(name):
                self.replacements[plain] = parameter.data

        if config.tie_word_embeddings and (untied := sorted(self.replacements.keys() & tied_names(model))):
            # PEFT trains a copy of what it saves whole, and the other name keeps the base's weight.
            raise UserError(
                f"--adapter {folder}: it holds a {untied[0]} of its own, where model and original have one "
                "weight for embedding and head: use the adapter with PEFT, or train without that module"
            )
        self.changed = self.layers.keys() | self.replacements.keys()

    @torch.no_grad()
    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the base model to the merged model's, of the same type. The tensor may be overwritten."""
        if name in self.replacements:
            return self.replacements[name].to(tensor.dtype)
        layer = self.layers[name]
        base_layer = layer.get_base_layer()
        stand_in, base_layer.weight = base_layer.weight, nn.Parameter(tensor, requires_grad=False)
        layer.merge(adapter_names=[ADAPTER])
        merged, base_layer.weight = base_layer.weight.data, stand_in
        layer.merged_adapters.clear()
        return merged


def tied_names(model: PeftModel) -> set[str]:
    tied = model.get_base_model()._tied_weights_keys
    return {*tied, *tied.values()}


def is_lora(name: str) -> bool:
    return ".lora_" in name


def load_adapter(config: MGMConfig, folder: Path) -> PeftModel:
    """The adapter's tensors in a model that has no others."""
    adapter_config = read_adapter_config(folder)
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config)
    try:
        with warnings.catch_warnings(action="ignore"):
            model = get_peft_model(model, adapter_config, low_cpu_mem_usage=True)
            give_stand_ins(model)
            result = model.load_adapter(folder, ADAPTER, torch_device="cpu", low_cpu_mem_usage=True)
    except KeyError as error:
        raise UserError(f"--adapter {folder}: it lacks {error}") from None
    except (RuntimeError, ValueError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines())
        raise UserError(f"--adapter {folder}: it does not fit the model ({reason})") from None
    check_loaded(model, folder, result.unexpected_keys)
    return model


def read_adapter_config(folder: Path) -> LoraConfig:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"--adapter {folder}: there is no {name} in it")
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != PeftType.LORA:
        raise UserError(f"--adapter {folder}: it is a {config.peft_type.value} adapter, and only LoRA can be merged")
    if config.init_lora_weights not in (True, False, "gaussian"):
        # PiSSA, OLoRA and their like subtract from the base's weights what LoRA starts with.
        raise UserError(f"--adapter {folder}: init_lora_weights {config.init_lora_weights!r} changes the base itself")
    config.inference_mode = True
    return config


def give_stand_ins(model: PeftModel) -> None:
    """Real weights without memory of their own (one zero, seen from everywhere) for the layers with LoRA: PEFT moves
    an adapter to where its layer is, and casts it to the layer's type, which fp32 makes harmless."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base_layer = module.get_base_layer()
            zero = torch.zeros((), dtype=torch.float32).expand(base_layer.weight.shape)
            base_layer.weight = nn.Parameter(zero, requires_grad=False)


def check_loaded(model: PeftModel, folder: Path, unexpected: list[str]) -> None:
    """Every tensor of the adapter has its place, and every place its tensor."""
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and (is_lora(name) or f".modules_to_save.{ADAPTER}." in name)
    ]
    problems = [f"unexpected {name}" for name in sorted(unexpected)] + [f"missing {name}" for name in sorted(missing)]
    if problems:
        raise UserError(f"--adapter {folder}: {len(problems)} tensors do not fit the model: {'; '.join(problems)}")
