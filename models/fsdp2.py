"""FSDP2, torch's fully_shard: every weight is split over the processes, and a layer's are gathered while it runs.

    plugin = fsdp2_plugin()                                             # of the launch config
    model, optimizer = prepare_sharded(accelerator, model, optimizer)   # accelerator.prepare, and what it leaves out

A unit, which is gathered at a time, is a whole layer: this project's functions read the weights of a layer's parts
without calling them (layers/fused_lora.py, layers/gated_mlp.py), so the whole layer must be there. Embedding and head
are units too, and the rest is one, gathered for the whole step.

A unit holds frozen weights in 16 bits beside trained ones in fp32. That is no mixture to FSDP2: it asks for one dtype
among a unit's trained parameters alone, gathers each parameter in its own dtype, and reduces gradients in fp32. So
what is trained is computed with, and updated, as under DDP; only its place is another.
"""

import os
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from models.zero3_leaves import whole_layers
from utils import UserError, name_some


# The launch config's keys, the value that each must have, and why.
NEEDED = {
    "fsdp_version": ("2", "version 1 needs one dtype for all parameters of a layer"),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "a layer must be gathered as a whole"),
    "fsdp_activation_checkpointing": ("false", "--gradient_checkpointing does it"),
}


def fsdp2_plugin() -> FullyShardedDataParallelPlugin | None:
    """The launch config's settings, for Accelerator; None: it asks for another strategy.

    Raises:
        UserError: the launch config asks for what cannot be.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return None
    for key, (value, reason) in NEEDED.items():
        found = os.environ.get(key.upper(), "")
        if found.lower() != value.lower():
            raise UserError(f"the launch config's {key} is {found or 'not set'}: {reason}, set it to {value}")
    # accelerate's own policy would compute with trained weights in 16 bits, and reduce their gradients in 16 bits.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def use_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """accelerate knows FSDP on accelerators alone; torch's runs on CPUs too, through gloo."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        plugin.cpu_offload = OffloadPolicy()  # none: all is in host memory
        use_fsdp2(accelerator, plugin)


def use_fsdp2(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Without a GPU, too."""
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):  # each new AcceleratorState copies PartialState's
        state.distributed_type = DistributedType.FSDP


def prepare_sharded(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any
) -> list[Any]:
    """accelerator.prepare under FSDP2. `model.generate` gathers what no layer holds, too.

    Raises:
        UserError: only one process has read the weights, and accelerate cannot hand out all that the model holds.
    """
    plugin = accelerator.state.fsdp_plugin
    buffers = sorted(model.state_dict().keys() & dict(model.named_buffers()).keys())
    if plugin.cpu_ram_efficient_loading and buffers:
        raise UserError(
            "the launch config's fsdp_cpu_ram_efficient_loading is true: accelerate hands out parameters alone, and "
            f"the model saves buffers too ({name_some(buffers)}), set it to false"
        )
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in whole_layers(model)})
    model, *prepared = accelerator.prepare(model, optimizer, *others)
    model.forward = accelerator.autocast()(model.forward)  # accelerate counts on its own policy, and leaves it out
    register_fsdp_forward_method(model, "generate")
    model.generate = _splitting_again(model, model.generate)
    return [model, *prepared]


def _splitting_again(model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, after which every parameter is split again: without a backward pass FSDP2 keeps some gathered, and
    would go on with those if the split ones were changed, as resuming does."""

    @wraps(generate)
    def generate_and_split(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    return generate_and_split


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether FSDP2 has split any of the tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor. Under FSDP2 all processes call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of it: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor, which every process has, as `other` is split, and on its device."""
    if not isinstance(other, DTensor):
        return tensor
    split = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return split.to(own_part(other).device)
