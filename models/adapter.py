"""Put a saved PEFT adapter onto its base model, or say in a line why it does not belong there."""

import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from models.loading import load_processor
from utils import UserError


def base_of(adapter: str) -> str:
    """The model that an adapter was trained on. Raises UserError where the folder holds no adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / name).is_file():
            raise UserError(f"--adapter {adapter}: there is no {name} in it")
    try:
        return PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--adapter {adapter}: its adapter_config.json cannot be read ({error})") from None


def check_base(adapter: str, model: str) -> None:
    """Folders may have moved; one of another name is another model."""
    base = base_of(adapter)
    if Path(base).name != Path(model).name:
        raise UserError(f"--adapter {adapter} was trained on {base}, not on {model}: give --model {base}")


def load_adapter(model: nn.Module, adapter: str) -> PeftModel:
    """The model with the adapter's tensors. Raises UserError where they do not all fit, or some are missing."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--adapter {adapter}: it does not fit the model ({reason})") from None


def load_trained_processor(model: str, adapter: str | None) -> ProcessorMixin:
    """The processor that the adapter was trained with, which lies beside it; the model's where there is none."""
    has_own = adapter is not None and (Path(adapter) / PROCESSOR_NAME).is_file()
    return load_processor(adapter if has_own else model)
