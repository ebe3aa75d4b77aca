"""Choose what is trained: the linear layers with LoRA, and the modules that are trained in full beside them."""

import re
from collections import Counter
from collections.abc import Callable

from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from layers.model_loss import head_of
from layers.quantization import is_quantized, num_values
from models.family import family_of
from models.parts import language_model, path_of, unused_modules, vision_tower
from utils import UserError


ALL_LINEAR = "all-linear"  # PEFT's word
# The second is GPT-2's, with a transposed weight. Others are subclasses, such as routers, which return something else.
LINEAR_LAYERS = (nn.Linear, Conv1D, FalconLinear)
INDEXER = "indexer"  # chooses the keys that sparse attention reads, and gets no gradient through that


def lora_pattern(model: PreTrainedModel, names: list[str], has_tower: bool) -> str:
    """A pattern of the paths of the layers that get LoRA: the language model's linear layers of these names.

    PEFT matches plain names by their end, and a vision tower may have a q_proj too.

    Args:
        has_tower: the vision tower's layers of these names as well.

    Raises:
        UserError: a name that no layer has, or a tower without any of the layers.
    """
    parts = [language_model(model)]
    if has_tower:
        tower = vision_tower(model)
        if tower is None:
            raise UserError(f"--lora_vision_tower true: {type(model).__name__} has no vision tower")
        parts.append(tower)
    layers = [linear_layers(model, part) for part in parts]
    if names == [ALL_LINEAR]:
        return _pattern(model, {path for found in layers for path in found})
    for name in names:
        if not any(name in found.values() for found in layers):
            choices = _choices({each for found in layers for each in found.values()})
            raise UserError(f"--lora_target_modules {name}: {type(parts[0]).__name__} has no such layer, {choices}")
    for part, found in zip(parts, layers, strict=True):
        if not set(names) & set(found.values()):
            flags = "--lora_vision_tower true, " if part is not parts[0] else ""
            flags += f"--lora_target_modules {' '.join(names)}"
            raise UserError(f"{flags}: {type(part).__name__} has no such layer, {_choices(set(found.values()))}")
    return _pattern(model, {path for found in layers for path, name in found.items() if name in names})


def linear_layers(model: PreTrainedModel, part: nn.Module) -> dict[str, str]:
    """The paths of a part's linear layers, each with its name: the path's last piece, and the one before it where that
    is a number."""
    head, found = head_of(model), {}
    for path, module in part.named_modules(prefix=path_of(model, part)):
        is_linear = type(module) in LINEAR_LAYERS or (isinstance(module, nn.Linear) and is_quantized(module))
        chooses = INDEXER in path.split(".")
        if is_linear and module is not head and not chooses:
            *_, before, name = path.split(".")
            found[path] = f"{before}.{name}" if name.isdecimal() else name
    refused = {*family_of(model.config).fused_layers, *taken_for_experts(model, set(found.values()))}
    return {path: name for path, name in found.items() if name not in refused}


def taken_for_experts(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Those of the names that PEFT takes for parts of the experts, now one tensor, as they were called in transformers
    4. It would train the experts, and not the linear layers of these names."""
    probe = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(probe, model, None)
    return names - set(probe.target_modules)


def takes_names_alone(model: PreTrainedModel) -> bool:
    """Whether PEFT makes plain names of a pattern, as it does for some models with experts."""
    probe = LoraConfig(target_modules=".*")
    convert_peft_config_for_transformers(probe, model, None)
    return not isinstance(probe.target_modules, str)


def is_transposed(model: PreTrainedModel) -> bool:
    """Whether the language model's linear layers have weights [in, out]."""
    return any(isinstance(module, Conv1D) for module in language_model(model).modules())


def _choices(names: set[str]) -> str:
    return f"choose {', '.join(sorted(names))} or {ALL_LINEAR}" if names else "nor any other linear layer"


def _pattern(model: nn.Module, paths: set[str]) -> str:
    """A pattern of exactly these paths, with `\\d+` for the number of a layer."""
    if not paths:
        raise UserError(f"--lora_target_modules {ALL_LINEAR}: {type(model).__name__} has no linear layer")
    all_paths = [path for path, _ in model.named_modules()]
    alternatives = {}
    for path in sorted(paths):
        pattern = re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(path))
        if pattern not in alternatives:
            alternatives[pattern] = {each for each in all_paths if re.fullmatch(pattern, each)} <= paths
    general = [pattern for pattern, is_exact in alternatives.items() if is_exact]
    others = [path for path in sorted(paths) if not any(re.fullmatch(pattern, path) for pattern in general)]
    return "|".join([*general, *map(re.escape, others)])


def select_modules(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules to train in full, by path: those whose path ends with one of the names.

    A module inside another chosen one is left out. A list of modules is replaced by its members, since PEFT cannot
    wrap a list. Raises UserError for a name that ends no path, or a module that cannot be trained.
    """
    having_weights = {p: module for p, module in model.named_modules() if p and list(module.parameters())}
    found = {}
    for name in names:
        matching = {p: module for p, module in having_weights.items() if f".{p}".endswith(f".{name}")}
        if not matching:
            known = sorted({path.rpartition(".")[2] for path in having_weights})
            choices = ", ".join(path for path in known if not path.isdecimal())
            raise UserError(f"--trainable_modules {name}: {type(model).__name__} has no such module, only {choices}")
        if any(is_quantized(module) for module in matching.values()):
            raise UserError(f"--trainable_modules {name}: 4-bit weights stay as they are, leave out --quantize")
        for path, module in matching.items():
            members = module.named_children() if isinstance(module, nn.ModuleList) else []
            found |= {f"{path}.{key}": member for key, member in members} or {path: module}
    return {path: module for path, module in found.items() if not any(path.startswith(f"{p}.") for p in found)}


def default_modules(model: PreTrainedModel, has_adapter: bool) -> list[str]:
    """The modules trained in full unless a flag names others: the family's, without LoRA also the language model."""
    names = list(family_of(model.config).trainable_modules)
    if has_adapter:
        return names
    head = head_of(model)
    return names + [path_of(model, part) for part in (language_model(model), head) if part is not None]


def check_beside_lora(model: nn.Module, modules: dict[str, nn.Module], pattern: str, names: list[str]) -> None:
    """Raise UserError if one of the `modules`, chosen by `names`, also has LoRA, or shares a weight with another.

    PEFT trains a copy of each module. If a head shares its weight with the embedding, its copy would be a second
    weight, and a checkpoint of such a model holds only one.
    """
    has_lora = re.compile(pattern).fullmatch
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in modules.items():
        inside = next((p for p, _ in module.named_modules(prefix=path) if has_lora(p)), None)
        own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
        problem = None
        if inside is not None:
            problem = f"{path} has LoRA in it, {inside}"
        elif any(uses[key] > count for key, count in own.items()):
            problem = f"{path} shares its weight with another module, and a copy of it would not"
        if problem is not None:
            raise UserError(f"--trainable_modules {' '.join(names)}: {problem}: leave it out or choose --lora_r 0")


def report_layers_without_lora(model: PreTrainedModel, pattern: str, report: Callable[[str], None]) -> None:
    """Tell `report` of the language model's layers that have no layer of the names chosen: hybrid models have several
    kinds of attention."""
    has_lora = re.compile(pattern).fullmatch
    decoder = language_model(model)
    linear = linear_layers(model, decoder)
    for name, layers in decoder.named_children():
        if isinstance(layers, nn.ModuleList):
            prefix = f"{path_of(model, decoder)}.{name}."
            found = [[path for path in linear if path.startswith(f"{prefix}{i}.")] for i in range(len(layers))]
            bare = [each for each in found if not any(map(has_lora, each))]
            if 0 < len(bare) < len(found):
                names = ", ".join(sorted({linear[path] for path in bare[0]}))
                num_layers = f"{len(found) - len(bare)} of {len(found)} layers"
                report(f"LoRA is on {num_layers}: the others have {names}, see --lora_target_modules {ALL_LINEAR}")


def freeze_unused(model: nn.Module) -> list[str]:
    """Freeze what cannot get a gradient, because DDP would wait for one. Returns the paths of the frozen modules."""
    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # its copy runs, but --lora_bias all unfroze the original too
                module.original_module.requires_grad_(False)
    paths = {id(module): path for path, module in base.named_modules()}
    found = [module for module in unused_modules(base) if trained_parameters(module)]
    for module in found:
        module.requires_grad_(False)
    return [paths[id(module)].replace(".modules_to_save.default", "") for module in found]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trained). PEFT's frozen originals of the modules trained in full do not count."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    originals = {id(p) for wrapper in wrappers for p in wrapper.original_module.parameters()}
    counted = [p for p in model.parameters() if id(p) not in originals]
    return sum(map(num_values, counted)), sum(num_values(p) for p in counted if p.requires_grad)
