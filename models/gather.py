"""Gather parameters that ZeRO-3 or FSDP2 has partitioned, and those that are saved in a checkpoint or an adapter."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from models.fsdp2 import is_sharded, whole


def gather_trained(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The tensors to save, by name, on the main process's CPU. None: save the model as it is.

    For a model with an adapter these are the parameters that PEFT saves. The frozen rest is not gathered.
    """
    unwrapped = accelerator.unwrap_model(model)
    if isinstance(unwrapped, PeftModel):
        saved = {name: p for name, p in unwrapped.named_parameters() if p.requires_grad or ".modules_to_save." in name}
    elif is_sharded(unwrapped.parameters()):  # accelerate would write a tied weight under both names
        tied = dict(unwrapped.named_parameters(remove_duplicate=False)).keys() - dict(unwrapped.named_parameters())
        saved = {name: tensor for name, tensor in unwrapped.state_dict().items() if name not in tied}
    else:
        return accelerator.get_state_dict(model) if is_split_by_zero3(unwrapped.parameters()) else None
    tensors = {}
    with gathered(list(saved.values())):
        for name, parameter in saved.items():
            tensor = whole(parameter.detach())
            if accelerator.is_main_process:
                tensors[name] = tensor.to("cpu", copy=True)
    return tensors


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 or FSDP2 has partitioned the parameters among the processes."""
    parameters = list(parameters)
    return is_split_by_zero3(parameters) or is_sharded(parameters)


def is_split_by_zero3(parameters: Iterable[nn.Parameter]) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """A context in which parameters that ZeRO-3 has partitioned are unsharded. Changes by the process `modifier_rank`
    reach all processes."""
    if not is_split_by_zero3(parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
