"""Gated MLPs that keep two wide tensors for the backward pass instead of three.

A gated MLP computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`. Autograd saves the gate, the activation of the
gate, and up: three tensors as wide as the MLP. The activation is cheap to recompute from the gate, so here only gate
and up are saved. A layer without checkpointing keeps a quarter less that way, at no cost in time.

Only MLPs whose forward is this formula and nothing else are changed. Others have the same parts, and a clamp, a scale
or dropout besides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from layers.tiled_mlp import layer_mlps


NUM_TILES = 8  # pieces of the backward pass: each temporary is as large as one piece


def recompute_activations(model: nn.Module) -> None:
    """Make the MLPs of the formula above recompute their activation, in the layers that are not checkpointed."""
    for mlp in layer_mlps(model, checkpointed=False):
        for part in mlp.modules():  # PEFT wraps an MLP that is trained in full
            if is_gated_mlp(part):
                part.forward = partial(_forward, part)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether its forward is the formula above, in either of the two ways in which transformers writes it."""
    act_fn = getattr(module, "act_fn", None)
    return (
        isinstance(act_fn, nn.Module)
        and not list(act_fn.parameters())  # they would get no gradient
        and "forward" not in vars(module)
        and _instructions(type(module).forward) in (_instructions(_formula), _instructions(_formula_in_two_steps))
    )


def _formula(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _formula_in_two_steps(self: Any, x: torch.Tensor) -> torch.Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _instructions(function: Callable) -> tuple[bytes, tuple[str, ...]] | None:
    """What the interpreter does, whatever the arguments are called; None for what is not written in Python."""
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names)


def _forward(mlp: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)
    return mlp.down_proj(GatedActivation.apply(gate, up, mlp.act_fn))


class GatedActivation(torch.autograd.Function):
    """`act_fn(gate) * up`, elementwise."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor, act_fn: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act_fn = act_fn
        return act_fn(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        # The gradients overwrite the saved tensors: nobody else reads them. Autograd notices the write and refuses a
        # second backward pass through the same graph.
        gate, up = ctx.saved_tensors
        tiles = (x.tensor_split(NUM_TILES) for x in (gate.view(-1), up.view(-1), gradient.flatten()))
        for gate_tile, up_tile, gradient_tile in zip(*tiles, strict=True):
            _replace_by_gradients(gate_tile, up_tile, gradient_tile, ctx.act_fn)
        return gate, up, None


def _replace_by_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, act_fn: nn.Module) -> None:
    """Overwrite `gate` and `up` with their gradients, given the gradient of `act_fn(gate) * up`."""
    leaf = gate.detach().requires_grad_()
    with torch.enable_grad():
        activation = act_fn.forward(leaf)  # not act_fn(leaf): ZeRO-3's hooks expect no module to run here
    (gate_gradient,) = torch.autograd.grad(activation, leaf, gradient * up)
    torch.mul(gradient, activation.detach(), out=up)
    gate.copy_(gate_gradient)
