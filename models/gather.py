"""Gather the parameters that ZeRO-3 has partitioned, and those that are saved in a checkpoint or an adapter."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn


def gather_trained(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The tensors to save, by name, on the main process's CPU. None: save the model as it is.

    For a model with an adapter these are the parameters that PEFT saves. The frozen rest is not gathered.
    """
    unwrapped = accelerator.unwrap_model(model)
    if not isinstance(unwrapped, PeftModel):
        return accelerator.get_state_dict(model) if is_partitioned(unwrapped.parameters()) else None
    saved = {name: p for name, p in unwrapped.named_parameters() if p.requires_grad or ".modules_to_save." in name}
    with gathered(list(saved.values())):
        if not accelerator.is_main_process:
            return {}
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in saved.items()}


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 has partitioned the parameters among the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """A context in which the parameters are unsharded. Changes by the process `modifier_rank` reach all processes."""
    if not is_partitioned(parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
