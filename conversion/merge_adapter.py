"""Merge a LoRA adapter with PEFT, and refuse one whose merge would be wrong or incomplete."""

import re
import warnings
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from transformers import PreTrainedModel

from conversion.weight_files import Tensors, read_weights
from layers.model_loss import head_of
from models.adapter import base_of
from utils import UserError


def changed_modules(folder: Path) -> set[str]:
    """The paths of the modules for which an adapter has tensors."""
    names = read_weights(folder / "adapter_model.safetensors")
    return {re.sub(r"\.(lora_.*|weight|bias)$", "", name.removeprefix("base_model.model.")) for name in names}


def merge_adapter(model: PreTrainedModel, folder: Path) -> Tensors:
    """Merge the adapter into `model`, and return all of its tensors.

    Raises:
        UserError: the folder holds no LoRA adapter, or one whose tensors do not all fit the model.
    """
    adapter_config = read_adapter_config(folder)
    ends = (model.get_input_embeddings(), head_of(model))
    tied = {path for path, module in model.named_modules() if module in ends} & changed_modules(folder)
    if tied and model.config.tie_word_embeddings:
        # PEFT trains a copy for one of the two; merged, the model has a single weight for both.
        raise UserError(
            f"--adapter {folder}: it holds a {tied.pop()}.weight of its own, where the model has one weight for "
            "embedding and head: use the adapter with PEFT, or train without that module"
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            peft_model = get_peft_model(model, adapter_config)
            result = peft_model.load_adapter(folder, "default", torch_device="cpu")
            problems = [f"unexpected {name}" for name in sorted(result.unexpected_keys)]
            problems += [f"missing {name}" for name in sorted(result.missing_keys)]
            if problems:
                found = f"{len(problems)} tensors do not fit the model: {'; '.join(problems)}"
                raise UserError(f"--adapter {folder}: {found}")
            return peft_model.merge_and_unload().state_dict()
    except KeyError as error:
        raise UserError(f"--adapter {folder}: it lacks {error}") from None
    except (RuntimeError, ValueError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines())
        raise UserError(f"--adapter {folder}: it does not fit the model ({reason})") from None


def read_adapter_config(folder: Path) -> LoraConfig:
    base_of(str(folder))  # raises UserError where there is no adapter
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != PeftType.LORA:
        raise UserError(f"--adapter {folder}: it is a {config.peft_type.value} adapter, and only LoRA can be merged")
    if config.init_lora_weights not in (True, False, "gaussian"):
        # PiSSA, OLoRA and their like subtract LoRA's initial product from the base's weights.
        raise UserError(f"--adapter {folder}: init_lora_weights {config.init_lora_weights!r} changes the base itself")
    return config
