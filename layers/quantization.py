"""The frozen language model in 4 bits (QLoRA, arXiv:2305.14314): bitsandbytes' NF4 with double quantization.

    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=nf4_config(torch.bfloat16))
    model = quantize_language_model(model, torch.bfloat16)    # what is no checkpoint: a preset, a model on `meta`

Two values of a linear layer's weight share a byte, 64 of them a scale of a byte, 256 scales one in fp32: 4.127 bits a
weight. Towers, mining, projector, embeddings and head stay as they are.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel


if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit


QUANTIZATIONS = ("none", "nf4")
# Where a language model has its layers: without a vision side, and with one.
LANGUAGE_LAYERS = r"(?:model\.layers|.*\blanguage_model)"


def check_quantization() -> None:
    """Raise ImportError or RuntimeError where bitsandbytes is missing or has no code for the device that is there."""
    from bitsandbytes.functional import quantize_4bit

    quantize_4bit(torch.zeros(64, device=compute_device()), quant_type="nf4")


def compute_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """For `from_pretrained`, which then puts the model where it computes."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[rf"(?!{LANGUAGE_LAYERS}\.).*"],  # for 4 bits too, whatever the name says
    )


def quantize_language_model(model: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Replace the language model's linear layers, as `from_pretrained` does with `nf4_config`.

    Layers on `meta` stay there: a model of that kind is what memory is predicted from.
    """
    from bitsandbytes.functional import create_dynamic_map, name2qmap

    with torch.device("cpu"):  # it is worked out from data, which `meta` lacks
        name2qmap.setdefault("dynamic", create_dynamic_map())
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and re.match(rf"{LANGUAGE_LAYERS}\.", path):
            model.set_submodule(path, quantize_linear(module, compute_dtype))
    model.is_loaded_in_4bit = True  # PEFT asks for it
    keep_layout(model)
    return model


def quantize_linear(linear: nn.Linear, compute_dtype: torch.dtype) -> "Linear4bit":
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"compress_statistics": True, "quant_type": "nf4"}
    weight = linear.weight.detach() if linear.weight.is_meta else linear.weight.detach().to(compute_device())
    packed, state = quantize_4bit(weight, **settings)
    layer = Linear4bit(linear.in_features, linear.out_features, False, compute_dtype, **settings, device="meta")
    layer.weight = Params4bit(packed, False, state, **settings, module=layer, bnb_quantized=True)
    layer.quant_state = state
    layer.bias = linear.bias
    return layer.requires_grad_(False)


def dequantize(packed: torch.Tensor, state: "QuantState") -> torch.Tensor:
    """A layer's weight as the layer computes with it: [out_features, in_features] in the weight's first dtype."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the weights anew when a CPU evaluates: that form has no backward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())


def num_values(parameter: nn.Parameter) -> int:
    """Elements of the weight that a parameter stands for: packed, split by ZeRO-3, or as it is."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()


def state_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales and code tables by name. They belong to the weights, but are neither parameters nor buffers."""
    for name, parameter in model.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            yield from _tensors(name, state)


def _tensors(name: str, state: "QuantState") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            yield f"{name}.{key}", value
        elif isinstance(value, type(state)):
            yield from _tensors(f"{name}.{key}", value)


def replace_tensors(state: "QuantState", change: Callable[[torch.Tensor], torch.Tensor]) -> "QuantState":
    """A state with other tensors in the place of its own."""
    replaced = copy.copy(state)
    for key, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(replaced, key, change(value))
        elif isinstance(value, type(state)):
            setattr(replaced, key, replace_tensors(value, change))
    return replaced
