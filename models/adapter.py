"""Load a saved PEFT adapter onto its base model, or say in one line why it does not fit."""

import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from models.loading import check_is_no_preset, load_processor
from models.lora import freeze_unused
from utils import UserError, name_some


def base_of(adapter: str) -> str:
    """The model that an adapter was trained on. Raises UserError if the folder holds no adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / name).is_file():
            raise UserError(f"--adapter {adapter}: there is no {name} in it")
    try:
        return PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--adapter {adapter}: its adapter_config.json cannot be read ({error})") from None


def check_base(adapter: str, model: str) -> None:
    """Raise UserError if the adapter was trained on another model. Only the folders' names are compared: a folder may
    have moved."""
    base = base_of(adapter)
    if Path(base).name != Path(model).name:
        raise UserError(f"--adapter {adapter} was trained on {base}, not on {model}: give --model {base}")


def load_adapter(model: nn.Module, adapter: str) -> PeftModel:
    """The model with the adapter's tensors, frozen.

    Raises:
        UserError: the file lacks a tensor that the adapter trains, has one without a place, or one of another shape.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = False  # marks the trained parameters by requires_grad, for the comparison below
        with warnings.catch_warnings(action="ignore"):  # PEFT warns if the base's folder has moved
            model = get_peft_model(model, config)
            found = set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
    except KeyError as error:  # a tensor of a module trained in full
        raise UserError(f"--adapter {adapter}: it does not fit the model (missing {error.args[0]})") from None
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--adapter {adapter}: it does not fit the model ({reason})") from None
    freeze_unused(model)  # train.py does not train or save these
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = [f"missing {name}" for name in found.missing_keys if name in trained]
    problems += [f"unexpected {name}" for name in found.unexpected_keys]
    if problems:
        raise UserError(f"--adapter {adapter}: it does not fit the model ({name_some(problems)})")
    return model.requires_grad_(False).eval()


def load_trained_processor(model: str, adapter: str | None) -> ProcessorMixin:
    """The processor in the adapter's folder, with which it was trained; without one, the model's."""
    check_is_no_preset(model)
    has_own = adapter is not None and (Path(adapter) / PROCESSOR_NAME).is_file()
    return load_processor(adapter if has_own else model)
