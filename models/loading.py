"""Load a model's configuration, weights and processor: from a folder, the hub, or a preset's name."""

import json
import math
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_utils import set_quantized_state

from layers.quantization import check_quantization, keep_layout, nf4_config, quantize_language_model
from mgm import PRESETS
from utils import UserError, brief_error


def is_preset(name: str) -> bool:
    """Whether `name` is a preset. A folder of that name has priority: the README's conversion writes `mgm-2b`."""
    return name in PRESETS and not Path(name).is_dir()


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a preset, a folder or a hub id. Raises UserError if there is none."""
    if is_preset(name):
        return PRESETS[name]()
    return _from_pretrained(AutoConfig, name)


def is_text_only(config: PreTrainedConfig) -> bool:
    """Whether it is a language model alone, which takes no images."""
    return type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_model(name: str, dtype: torch.dtype, attn_implementation: str, quantize: str = "none") -> PreTrainedModel:
    """A preset with random weights, or the model of a folder or a hub id. Raises UserError if it cannot be loaded.

    With `quantize` nf4 the language model's linear layers hold 4 bits per weight, and compute in `dtype`.
    """
    config = load_config(name)
    auto_class = AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText
    is_quantized = quantize != "none"
    if is_quantized:
        require_quantization(quantize)
    if is_preset(name) or torch.get_default_device().type == "meta":  # no weights are read
        with set_quantized_state() if is_quantized else nullcontext():  # ZeRO-3 must partition the 4-bit weights only
            model = auto_class.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return quantize_language_model(model, dtype) if is_quantized else model
    model, info = _from_pretrained(
        auto_class,
        name,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        quantization_config=nf4_config(dtype) if is_quantized else None,
    )
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"--model {name}: the weights do not fit the config ({found})")
    keep_layout(model)
    return model


def require_quantization(quantize: str) -> None:
    """Raise UserError if this machine cannot quantize."""
    try:
        check_quantization()
    except ImportError:
        raise UserError(f"--quantize {quantize}: bitsandbytes is missing, pip install -r requirements.txt") from None
    except RuntimeError as error:
        reason = f"{brief_error(error)}; python -m bitsandbytes tells more"
        raise UserError(f"--quantize {quantize}: bitsandbytes cannot compute here ({reason})") from None


def load_processor(name: str) -> ProcessorMixin:
    """The processor of a folder or a hub id. Raises UserError if there is none."""
    if is_preset(name):
        raise UserError(
            f"--model {name}: there is no such folder here, and the preset of that name has no tokenizer; make the "
            "folder with convert_mgm.py"
        )
    return _from_pretrained(AutoProcessor, name)


def _from_pretrained(auto_class: type, name: str, **kwargs: Any) -> Any:
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--model {name}: no such folder, and the presets are {', '.join(PRESETS)}")
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, pickle.UnpicklingError) as error:
        check_no_adapter(name)
        if isinstance(error, ImportError) and (attention := kwargs.get("attn_implementation")):
            remedy = "choose sdpa, or install requirements-gpu.txt"
            raise UserError(f"--attn_implementation {attention}: {brief_error(error)}; {remedy}") from None
        raise UserError(f"--model {name}: cannot be loaded ({error})") from None


def check_no_adapter(name: str) -> None:
    """Raise UserError if the folder holds an adapter only. The message names the adapter's base."""
    try:
        base = json.loads((Path(name) / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        return
    raise UserError(
        f"--model {name}: it holds an adapter, not a model. Give its base, --model {base}; eval.py takes both with "
        f"--adapter {name}"
    )


def num_positions(model: str) -> float:
    """The most tokens that a row of the language model may have; infinity if its config names no limit."""
    text_config = load_config(model).get_text_config()
    return getattr(text_config, "max_position_embeddings", None) or math.inf
