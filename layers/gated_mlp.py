"""Gated MLPs that keep two wide tensors for the backward pass instead of three, and need no more while it runs.

A gated MLP computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`. Autograd saves the gate, the activation of the
gate, and up: three tensors as wide as the MLP. Here only gate and up are saved, and their gradients are computed in
their place. The activation is computed again, which takes a few microseconds. Where the three linear layers are
frozen, one function computes the whole MLP.

Only MLPs whose forward is this formula and nothing else are changed. Others have the same parts, and a clamp, a scale
or dropout besides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from layers.formula import is_formula
from layers.frozen_linear import frozen_linear, frozen_weight, is_frozen_linear, product_dtype
from layers.tiled_mlp import layers_with_mlp
from layers.unused_output import output_is_unused


aten = torch.ops.aten
NUM_TILES = 8  # pieces of the backward pass of an activation that is not known here


def fuse_gated_mlps(model: nn.Module, reads_weights: bool = True) -> None:
    """Give the MLPs of the formula above the forward of this file.

    `reads_weights`: without calling the linear layers. ZeRO-3 gathers a weight for its module's call alone.
    """
    for layer in layers_with_mlp(model):
        for part in layer.mlp.modules():  # PEFT wraps an MLP that is trained in full
            if is_gated_mlp(part):
                part.forward = partial(_forward, part, reads_weights)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether its forward is the formula above, in either of the two ways in which transformers writes it."""
    act_fn = getattr(module, "act_fn", None)
    return (
        isinstance(act_fn, nn.Module)
        and not list(act_fn.parameters())  # they would get no gradient
        and not getattr(act_fn, "inplace", False)  # the gate is saved
        and "forward" not in vars(module)
        and any(is_formula(type(module).forward, formula) for formula in (_formula, _formula_in_two_steps))
    )


def _formula(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _formula_in_two_steps(self: Any, x: torch.Tensor) -> torch.Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _forward(mlp: nn.Module, reads_weights: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    if reads_weights and all(map(is_frozen_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))):
        return FrozenGatedMLP.apply(hidden_states, mlp)
    gate, up = mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)
    return mlp.down_proj(GatedActivation.apply(gate, up, mlp.act_fn))


class GatedActivation(torch.autograd.Function):
    """`act_fn(gate) * up`, elementwise."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor, act_fn: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act_fn = act_fn
        return _activated(gate, up, act_fn)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *_gradients(*ctx.saved_tensors, gradient, ctx.act_fn), None


class FrozenGatedMLP(torch.autograd.Function):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))` of x [..., D]."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        inputs = x.to(product_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            gate, up = frozen_linear(inputs, mlp.gate_proj), frozen_linear(inputs, mlp.up_proj)
            ctx.save_for_backward(gate, up)
            ctx.mlp, ctx.dtype = mlp, x.dtype
            if output_is_unused(mlp):
                return gate.new_empty(*gate.shape[:-1], mlp.down_proj.out_features)
            return frozen_linear(_activated(gate, up, mlp.act_fn), mlp.down_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate, up), mlp = ctx.saved_tensors, ctx.mlp
        of_product = gradient.to(gate.dtype) @ frozen_weight(mlp.down_proj, gate.dtype)
        of_gate, of_up = _gradients(gate, up, of_product, mlp.act_fn)
        of_x = of_gate @ frozen_weight(mlp.gate_proj, gate.dtype)
        of_x.flatten(0, -2).addmm_(of_up.flatten(0, -2), frozen_weight(mlp.up_proj, gate.dtype))
        return of_x.to(ctx.dtype), None


def _activated(gate: torch.Tensor, up: torch.Tensor, act_fn: nn.Module) -> torch.Tensor:
    activation = act_fn(gate)
    return gate * up if activation is gate else activation.mul_(up)


def _gradients(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, act_fn: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gate and up, given that of `act_fn(gate) * up`.

    They overwrite the two, which nobody else reads. Autograd notices the write and refuses a second backward pass
    through the same graph.
    """
    known = _in_place(act_fn)
    if known is not None:
        activate, derive = known
        derive(up.mul_(gradient), gate, grad_input=up)
        activate(gate).mul_(gradient)
        return up, gate
    tiles = (x.tensor_split(NUM_TILES) for x in (gate.view(-1), up.view(-1), gradient.flatten()))
    for gate_tile, up_tile, gradient_tile in zip(*tiles, strict=True):
        _replace_by_gradients(gate_tile, up_tile, gradient_tile, act_fn)
    return gate, up


def _in_place(act_fn: nn.Module) -> tuple[Callable, Callable] | None:
    """SiLU and GELU in place, and the gradient of their input: (gradient, input, grad_input=result). None: another."""
    if isinstance(act_fn, (nn.SiLU, SiLUActivation)):
        return aten.silu_, aten.silu_backward.grad_input
    approximate = _gelu_approximation(act_fn)
    if approximate is None:
        return None
    return (
        partial(aten.gelu_, approximate=approximate),
        partial(aten.gelu_backward.grad_input, approximate=approximate),
    )


def _gelu_approximation(act_fn: nn.Module) -> str | None:
    """torch's name of it; None: the module is no GELU of torch's."""
    if isinstance(act_fn, nn.GELU):
        return act_fn.approximate
    if not isinstance(act_fn, (GELUActivation, GELUTanh)):
        return None
    function, keywords = act_fn.act, {}  # torch's, or one that is written in Python
    if isinstance(function, partial):
        function, keywords = function.func, function.keywords
    return keywords.get("approximate", "none") if function is F.gelu else None


def _replace_by_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, act_fn: nn.Module) -> None:
    """Overwrite `gate` and `up` with their gradients, given the gradient of `act_fn(gate) * up`."""
    leaf = gate.detach().requires_grad_()
    with torch.enable_grad():
        activation = act_fn.forward(leaf)  # not act_fn(leaf): ZeRO-3's hooks expect no module to run here
    (gate_gradient,) = torch.autograd.grad(activation, leaf, gradient * up)
    torch.mul(gradient, activation.detach(), out=up)
    gate.copy_(gate_gradient)
