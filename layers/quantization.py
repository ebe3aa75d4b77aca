"""The frozen language model in 4 bits (QLoRA, arXiv:2305.14314): bitsandbytes' NF4 with double quantization.

    model = auto_class.from_pretrained(folder, quantization_config=nf4_config(torch.bfloat16, "model.language_model"))
    quantize_language_model(model, "model.language_model", torch.bfloat16)    # of a preset, or a model on `meta`

Two values of a linear layer's weight share a byte, 64 values share a one-byte scale, and 256 scales share an fp32
scale: 4.127 bits a weight. Towers, projectors, embeddings and head are not quantized, nor are experts that lie in one
tensor.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit


QUANTIZATIONS = ("none", "nf4")


def check_quantization() -> None:
    """Raise ImportError if bitsandbytes is missing, RuntimeError if it cannot compute on this machine's device."""
    from bitsandbytes.functional import quantize_4bit

    quantize_4bit(torch.zeros(64, device=compute_device()), quant_type="nf4")


def compute_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def nf4_config(compute_dtype: torch.dtype, language_model: str, left_out: Iterable[str] = ()) -> BitsAndBytesConfig:
    """For `from_pretrained`, which then loads the model to the device that computes. `language_model`: its path;
    `left_out`: the names of layers that are not quantized."""
    skipped = [rf"(?!{re.escape(language_model)}\.).*", *(rf".*\.{re.escape(name)}" for name in left_out)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,  # despite its name it also applies to 4 bits
    )


def quantize_language_model(
    model: PreTrainedModel, language_model: str, compute_dtype: torch.dtype, left_out: Collection[str] = ()
) -> None:
    """Replace the linear layers of the language model, which has this path, as `from_pretrained` does with
    `nf4_config`.

    Layers on `meta` stay there: memory is predicted from such a model.
    """
    from bitsandbytes.functional import create_dynamic_map, name2qmap

    with torch.device("cpu"):  # it is computed from data, which tensors on `meta` lack
        name2qmap.setdefault("dynamic", create_dynamic_map())
    for path, module in list(model.get_submodule(language_model).named_modules(prefix=language_model)):
        is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if is_linear and path.rpartition(".")[2] not in left_out:
            model.set_submodule(path, quantize_linear(module, compute_dtype))
    model.is_loaded_in_4bit = True  # PEFT reads it
    keep_layout(model)


def quantize_linear(linear: nn.Linear | Conv1D, compute_dtype: torch.dtype) -> "Linear4bit":
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"compress_statistics": True, "quant_type": "nf4"}
    weight = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
    weight = weight.contiguous() if weight.is_meta else weight.contiguous().to(compute_device())
    packed, state = quantize_4bit(weight, **settings)
    layer = Linear4bit(weight.shape[1], weight.shape[0], False, compute_dtype, **settings, device="meta")
    layer.weight = Params4bit(packed, False, state, **settings, module=layer, bnb_quantized=True)
    layer.quant_state = state
    layer.bias = linear.bias
    return layer.requires_grad_(False)


def dequantize(packed: torch.Tensor, state: "QuantState") -> torch.Tensor:
    """The weight that a layer computes with: [out_features, in_features] in the dtype before quantization."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, state: "QuantState", bias: torch.Tensor | None
) -> torch.Tensor:
    """What a 4-bit linear layer computes, without a graph, in x's dtype."""
    from bitsandbytes import matmul_4bit

    with torch.no_grad():
        return matmul_4bit(x, packed, state, bias=bias)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the weights when a CPU evaluates: the new form has no backward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())


def num_values(parameter: nn.Parameter) -> int:
    """The elements of a parameter before 4-bit packing and before ZeRO-3's partitioning."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()


def state_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales and code tables by name. They belong to 4-bit weights, but are neither parameters nor buffers."""
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
    """A copy of the state, each of its tensors replaced by `change(tensor)`."""
    replaced = copy.copy(state)
    for key, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(replaced, key, change(value))
        elif isinstance(value, type(state)):
            setattr(replaced, key, replace_tensors(value, change))
    return replaced
