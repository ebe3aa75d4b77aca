"""Load a model's configuration, weights and processor: from a folder, the hub, or a preset's name."""

import json
import math
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
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
from models.parts import language_model, path_of
from utils import UserError, brief_error


def is_preset(name: str) -> bool:
    """Whether `name` is a preset. A folder of that name has priority: the README's conversion writes `mgm-2b`."""
    return name in PRESETS and not Path(name).is_dir()


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a preset, a folder or a hub id. Raises UserError if there is none."""
    if is_preset(name):
        return PRESETS[name]()
    return _from_pretrained(AutoConfig, name)


def load_model(name: str, dtype: torch.dtype, attn_implementation: str, quantize: str = "none") -> PreTrainedModel:
    """A preset with random weights, or the model of a folder or a hub id. Raises UserError if it cannot be loaded.

    With `quantize` nf4 the language model's linear layers hold 4 bits per weight, and compute in `dtype`.
    """
    config = load_config(name)
    auto_class = auto_class_of(config, name)
    is_quantized = quantize != "none"
    if is_quantized:
        require_quantization(quantize)
        with torch.device("meta"), set_quantized_state():
            skeleton = _from_config(auto_class, name, config, dtype, attn_implementation)
        language_path = path_of(skeleton, language_model(skeleton))
    if is_preset(name) or torch.get_default_device().type == "meta":  # no weights are read
        with set_quantized_state() if is_quantized else nullcontext():  # ZeRO-3 must partition the 4-bit weights only
            model = _from_config(auto_class, name, config, dtype, attn_implementation)
        if is_quantized:
            quantize_language_model(model, language_path, dtype)
        return model
    model, info = _from_pretrained(
        auto_class,
        name,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        quantization_config=nf4_config(dtype, language_path) if is_quantized else None,
    )
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"--model {name}: the weights do not fit the config ({found})")
    keep_layout(model)
    remove_hook_from_submodules(model)  # of a quantized model, to move inputs to the one device where they are
    return model


def auto_class_of(config: PreTrainedConfig, name: str) -> type:
    """The Auto class of the config's model. Raises UserError for a model that does not write text token by token."""
    problem = None
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        problem = "its encoder reads the text that its decoder answers"
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = "it is no language model"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        problem = "it reads text in both directions"
    if problem is not None:
        raise UserError(
            f"--model {name}: a model of the type {config.model_type} cannot be trained here, {problem}; choose an "
            "image-text-to-text or a causal language model"
        )
    return AutoModelForCausalLM


def _from_config(
    auto_class: type, name: str, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    try:
        return auto_class.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    except (ValueError, ImportError) as error:
        raise _explained(error, name, attn_implementation) from None


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
        raise _explained(error, name, kwargs.get("attn_implementation")) from None


def _explained(error: Exception, name: str, attn_implementation: str | None) -> UserError:
    if attn_implementation is not None and "attention" in brief_error(error).lower():
        remedy = "choose eager" if attn_implementation == "sdpa" else "choose sdpa, or install requirements-gpu.txt"
        return UserError(f"--attn_implementation {attn_implementation}: {brief_error(error)}; {remedy}")
    return UserError(f"--model {name}: cannot be loaded ({' '.join(str(error).split())})")


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
