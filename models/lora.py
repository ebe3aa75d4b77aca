"""Choose what is trained: the linear layers with LoRA, and the modules that are trained in full beside them."""

import re
from collections import Counter

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from layers.quantization import LANGUAGE_LAYERS, is_quantized, num_values
from utils import UserError


ALL_LINEAR = "all-linear"  # PEFT's word


def lora_targets(names: list[str], language_model: nn.Module) -> list[str]:
    """The names of the layers that get LoRA; `all-linear` stands for all. Raises UserError for an unknown name."""
    modules = language_model.named_modules()
    known = sorted({path.rpartition(".")[2] for path, module in modules if isinstance(module, nn.Linear)})
    if names == [ALL_LINEAR]:
        return known
    for name in names:
        if name not in known:
            choices = f"{', '.join(known)} or {ALL_LINEAR}"
            raise UserError(
                f"--lora_target_modules {name}: {type(language_model).__name__} has no such layer, choose {choices}"
            )
    return names


def lora_pattern(targets: list[str]) -> str:
    return rf"{LANGUAGE_LAYERS}\..*\.({'|'.join(map(re.escape, targets))})"


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


def check_beside_lora(model: nn.Module, modules: dict[str, nn.Module], targets: list[str], names: list[str]) -> None:
    """Raise UserError if one of the `modules`, chosen by `names`, also has LoRA, or shares a weight with another.

    PEFT trains a copy of each module. If a head shares its weight with the embedding, its copy would be a second
    weight, and a checkpoint of such a model holds only one.
    """
    pattern = re.compile(lora_pattern(targets))
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in modules.items():
        inside = next((p for p, _ in module.named_modules(prefix=path) if pattern.fullmatch(p)), None)
        own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
        problem = None
        if inside is not None:
            problem = f"{path} has LoRA in it, {inside}"
        elif any(uses[key] > count for key, count in own.items()):
            problem = f"{path} shares its weight with another module, and a copy of it would not"
        if problem is not None:
            raise UserError(f"--trainable_modules {' '.join(names)}: {problem}: leave it out or choose --lora_r 0")


def freeze_unused(model: nn.Module) -> list[str]:
    """Freeze what cannot get a gradient, because DDP would wait for one. Returns the paths of the frozen modules."""
    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # its copy runs, but --lora_bias all unfroze the original too
                module.original_module.requires_grad_(False)
    unused = getattr(base.model, "unused_modules", list)()
    paths = {id(module): path for path, module in base.named_modules()}
    found = [module for module in unused if trained_parameters(module)]
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
