"""LoRA in few kernels: what PEFT computes, with half of the operators.

PEFT runs the frozen layer, A and B as layers of their own. Under autocast each call casts the input, A and B, scales
the product and adds it, an operator each. Here the product goes straight into the frozen layer's output, scaled on its
way, and so does the input's gradient:

    fuse_lora(model)    # once PEFT has made the adapter; not under ZeRO, which gathers what a layer's forward needs

The input is saved as it is, once for all layers that read it, with a mask of its dropout; PEFT saves what each layer's
dropout makes of it. DoRA, trained biases, several adapters at a time and merged ones go PEFT's way.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from layers.frozen_linear import frozen_linear, frozen_weight, is_frozen_linear, product_dtype


def fuse_lora(model: nn.Module) -> None:
    """Give the model's LoRA layers the forward of this file."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, nn.Linear):
            layer.forward = partial(_forward, layer)


def _forward(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = _adapter_to_fuse(layer)
    if name is None or args or kwargs or not is_frozen_linear(layer.base_layer):
        return type(layer).forward(layer, x, *args, **kwargs)
    dropout = layer.lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LoraFunction.apply(x, a, b, layer.base_layer, layer.scaling[name], share)


def _adapter_to_fuse(layer: LoraLayer) -> str | None:
    """The one adapter that is active, if it is LoRA and nothing else."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    return names[0] if layer.lora_B[names[0]].bias is None else None


class LoraFunction(torch.autograd.Function):
    """base_layer(x) [..., O] + scale * dropout(x) [..., I] @ A^T [I, r] @ B^T [r, O]"""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base_layer: nn.Linear,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        rows, mask = x.reshape(-1, x.shape[-1]).to(product_dtype(x)), None
        a_cast, b_scaled = a.to(rows.dtype), _multiplied(b, scale, rows.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the dtypes are right
            output = frozen_linear(rows, base_layer)
            dropped = rows
            if dropout:
                dropped, mask = torch.native_dropout(rows, dropout, True)
            hidden = dropped @ a_cast.T  # [T, r]
            output.addmm_(hidden, b_scaled.T)
        ctx.save_for_backward(rows, mask, a_cast, b_scaled, hidden)
        ctx.base_layer, ctx.scale, ctx.dropout = base_layer, scale, dropout
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, a.dtype, b.dtype)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, mask, a, b_scaled, hidden = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        of_output = gradient.reshape(-1, gradient.shape[-1])
        of_hidden = of_output @ b_scaled  # [T, r]
        of_b = _multiplied(of_output.T @ hidden, ctx.scale, b_dtype)
        of_a = (of_hidden.T @ _drop(rows, mask, ctx.dropout)).to(a_dtype)  # what was dropped is free again
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _drop(of_hidden @ a, mask, ctx.dropout)
            of_x.addmm_(of_output, frozen_weight(ctx.base_layer, rows.dtype))
            of_x = of_x.to(x_dtype).view(ctx.shape)
        return of_x, of_a, of_b, None, None, None


def _multiplied(x: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """x * factor in another dtype, by one operator."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _drop(x: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """x * mask / (1 - dropout): what dropout with that mask does, to a gradient too."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - dropout))
