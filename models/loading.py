"""Load a model's configuration, weights and processor: from a folder, the hub, or a preset's name."""

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_utils import set_quantized_state
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from chat.text_processor import TextProcessor
from layers.quantization import check_quantization, keep_layout, nf4_config, quantize_language_model
from models.family import family_of
from models.parts import language_model, path_of
from models.presets import PRESETS
from models.processors import give_chat_template, read_processor, read_tokenizer
from utils import UserError, brief_error, suggestion


LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, pickle.UnpicklingError, SafetensorError)
# What a config with wrong values raises besides: transformers' classes check some, PyTorch's others, none of them all.
CONFIG_ERRORS = (AttributeError, TypeError, AssertionError, ZeroDivisionError, StrictDataclassError)


def is_preset(name: str) -> bool:
    """Whether `name` is a preset. A folder of that name has priority: the README's conversion writes `mgm-2b`."""
    return name in PRESETS and not Path(name).is_dir()


def is_text_only(config: PreTrainedConfig) -> bool:
    """Whether the model of this config reads no images."""
    return type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a preset, a folder or a hub id.

    Raises:
        UserError: there is none, or transformers has no model for it that writes text token by token.
    """
    if is_preset(name):
        return PRESETS[name].config()
    check_exists(name)
    with errors_in_one_line(name):
        check_model_type(name, PreTrainedConfig.get_config_dict(name)[0])
        config = AutoConfig.from_pretrained(name)
    check_writes_text(name, config)
    return config


def check_writes_text(name: str, config: PreTrainedConfig) -> None:
    """Raise UserError for a model that does not write text token by token, after all that it has read."""
    kind = f"--model {name}: a model of the type {config.model_type}"
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise UserError(f"{kind} has an encoder and a decoder for text, choose one with a decoder alone")
    if is_text_only(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model {name}: transformers has no vision-language model and no causal language model of the type "
            f"{config.model_type}"
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise UserError(f"{kind} reads text in both directions, choose a causal language model")


def check_model_type(name: str, settings: dict[str, Any]) -> None:
    """Raise UserError if transformers does not know a config.json's model type. Code in the folder is not run."""
    if not settings:  # transformers reads a file that is missing as an empty one
        check_no_adapter(name)
        raise UserError(f"--model {name}: cannot be loaded (there is no config.json in it)")
    model_type = settings.get("model_type")
    if model_type is None:
        raise UserError(f"--model {name}: its config.json has no model_type")
    if model_type in CONFIG_MAPPING:
        return
    unknown = f"transformers {transformers.__version__} has no model of the type {model_type}"
    if "auto_map" in settings:
        raise UserError(f"--model {name}: {unknown}, and code that comes with a model (auto_map) is not run")
    raise UserError(f"--model {name}: {unknown}")


def load_model(name: str, dtype: torch.dtype, attn_implementation: str, quantize: str = "none") -> PreTrainedModel:
    """A preset with random weights, or the model of a folder or a hub id. Raises UserError if it cannot be loaded.

    With `quantize` nf4 the language model's linear layers hold 4 bits per weight, and compute in `dtype`.
    """
    config = load_config(name)
    auto_class = AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText
    is_quantized = quantize != "none"
    left_out = family_of(config).fused_layers
    if is_quantized:
        require_quantization(quantize)
    if is_preset(name) or torch.get_default_device().type == "meta":  # no weights are read
        with set_quantized_state() if is_quantized else nullcontext():  # ZeRO-3 must partition the 4-bit weights only
            model = _from_config(auto_class, name, config, dtype, attn_implementation)
        if is_quantized:
            quantize_language_model(model, path_of(model, language_model(model)), dtype, left_out)
        return model
    quantization_config = None
    if is_quantized:
        with torch.device("meta"), set_quantized_state():
            skeleton = _from_config(auto_class, name, config, dtype, attn_implementation)
        quantization_config = nf4_config(dtype, path_of(skeleton, language_model(skeleton)), left_out)
    model, info = _from_pretrained(
        auto_class,
        name,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        quantization_config=quantization_config,
    )
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"--model {name}: the weights do not fit the config ({found})")
    keep_layout(model)
    remove_hook_from_submodules(model)  # of a quantized model, to move inputs to the one device where they are
    return model


def _from_config(
    auto_class: type, name: str, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    try:
        make = partial(auto_class.from_config, config, dtype=dtype)
        return _with_attention(make, config, attn_implementation)
    except (ValueError, ImportError, AssertionError) as error:
        raise _explained(error, name, attn_implementation) from None


def _with_attention(make: Callable[..., Any], config: PreTrainedConfig, attn_implementation: str) -> Any:
    """`make(attn_implementation=...)`. Where a part of the model has no sdpa (Gemma 2) it gets eager, and the others
    sdpa: that is what transformers does by itself when it is not told."""
    try:
        return make(attn_implementation=attention_by_part(config, attn_implementation))
    except ValueError as error:
        if attn_implementation != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        return make(attn_implementation=None)


def attention_by_part(config: PreTrainedConfig, attn_implementation: str) -> str | dict[str, str]:
    """What transformers takes for a model's parts. An audio encoder, which never runs here, stays with eager
    attention: Gemma 4's knows no other."""
    if getattr(config, "audio_config", None) is None:
        return attn_implementation
    parts = dict.fromkeys(["", *config.sub_configs], attn_implementation)
    return parts | {"audio_config": "eager"}


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
    """The processor of a preset, a folder or a hub id, with a chat template; a text-only model's is a TextProcessor.

    A preset's has a tokenizer that reads single bytes, with the model's own special tokens.

    Raises:
        UserError: there is no processor or no chat template, or a package is missing.
    """
    if is_preset(name):
        return PRESETS[name].processor()
    check_exists(name)
    folder = Path(name)
    # An adapter's folder holds the processor with which it was trained, but no config.
    has_config = not (folder / PROCESSOR_NAME).is_file() or (folder / CONFIG_NAME).is_file()
    config = load_config(name) if has_config else None
    with errors_in_one_line(name):
        if config is not None and is_text_only(config):
            processor = TextProcessor(read_tokenizer(name))
        else:
            processor = read_processor(name, config)
        give_chat_template(name, processor, config)
    return processor


def check_is_no_preset(name: str) -> None:
    """Raise UserError for a preset: there is nothing in it to train or to ask."""
    if is_preset(name):
        raise UserError(
            f"--model {name}: there is no such folder here, and the preset of that name has neither weights nor a "
            "tokenizer; give a folder, a hub id such as Qwen/Qwen3-VL-2B-Instruct, or what convert_mgm.py makes"
        )


def check_exists(name: str) -> None:
    """Raise UserError if `name` is neither a folder nor written like a hub id. A folder's name that is mistyped looks
    like one; where the folder around it is here, the hub is not asked."""
    path = Path(name)
    if path.is_dir():
        return
    if len(path.parts) > 1 and path.parent.is_dir():
        folders = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
        raise UserError(f"--model {name}: no such folder{suggestion(path.name, folders)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        names = suggestion(name, PRESETS) or f", and the presets are {', '.join(PRESETS)}"
        raise UserError(f"--model {name}: no such folder{names}")


@contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a model's files into a UserError."""
    try:
        yield
    except (*LOADING_ERRORS, *CONFIG_ERRORS) as error:
        check_no_adapter(name)
        raise UserError(f"--model {name}: cannot be loaded ({brief_error(error)})") from None


def _from_pretrained(auto_class: type, name: str, attn_implementation: str, **kwargs: Any) -> Any:
    check_exists(name)
    try:
        make = partial(auto_class.from_pretrained, name, **kwargs)
        return _with_attention(make, kwargs["config"], attn_implementation)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"--model {name}: the weights do not fit the config (tensors of other shapes)") from None
    except (*LOADING_ERRORS, AssertionError) as error:
        check_no_adapter(name)
        raise _explained(error, name, attn_implementation) from None


def _explained(error: Exception, name: str, attn_implementation: str | None) -> UserError:
    if isinstance(error, ValueError) and attn_implementation is not None and "attention" in brief_error(error):
        model_class = brief_error(error).partition(" ")[0]
        return UserError(f"--attn_implementation {attn_implementation}: {model_class} has none, choose eager")
    if attn_implementation is not None and "attention" in brief_error(error).lower():
        remedy = "choose sdpa, or install requirements-gpu.txt"
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


def supports_gradient_checkpointing(model: str) -> bool:
    config = load_config(model)
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if is_text_only(config) else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return mapping[type(config)].supports_gradient_checkpointing


def num_decoder_layers(model: str) -> int:
    return load_config(model).get_text_config().num_hidden_layers


def num_positions(model: str) -> float:
    """The most tokens that a row of the language model may have; infinity if its config names no limit."""
    text_config = load_config(model).get_text_config()
    return getattr(text_config, "max_position_embeddings", None) or math.inf
