"""Frozen linear layers, plain or in 4 bits, whose products other layers' functions compute with their own.

A module's call and its backward pass cost the host more than a small matrix product costs a GPU. A function that knows
a layer's weight can also add its gradient to another one on the way, where autograd needs one more kernel for the sum.
"""

import torch
import torch.nn.functional as F
from torch import nn

from layers.quantization import dequantize, is_quantized, packed_linear


def is_frozen_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, plain or in 4 bits, that nobody trains and whose call nobody changes or awaits."""
    is_linear = type(module) is nn.Linear or (isinstance(module, nn.Linear) and is_quantized(module))
    has_own_forward = "forward" in vars(module)  # as accelerate's offloading gives it
    if not is_linear or has_own_forward or has_hooks(module):
        return False
    return not module.weight.requires_grad and (module.bias is None or not module.bias.requires_grad)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks wait for its call."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def frozen_weight(linear: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """[out_features, in_features], unpacked."""
    weight, state = linear.weight, getattr(linear.weight, "quant_state", None)
    return (weight if state is None else dequantize(weight, state)).to(dtype)


def frozen_linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """The layer's output [..., O] for x [..., I], in x's dtype. It has no graph."""
    weight, state = linear.weight, getattr(linear.weight, "quant_state", None)
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    if state is not None:
        return packed_linear(x, weight, state, bias)
    return F.linear(x, weight.to(x.dtype), bias)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which a linear layer computes with x: autocast's, if it is on."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
