"""Gated MLPs that keep two wide tensors for the backward pass instead of three.

`down_proj(act_fn(gate_proj(x)) * up_proj(x))` by itself keeps gate, up and the activation. The activation is quickly
made again from the gate. A quarter of what a layer without checkpointing keeps goes that way, at no cost in time.
"""

from functools import partial

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from layers.tiled_mlp import layer_mlps


PARTS = ("gate_proj", "up_proj", "act_fn", "down_proj")  # of Gemma, Llama, Qwen2 and Mistral
NUM_TILES = 8  # of the backward pass, whose temporaries are no larger than one


def recompute_activations(model: nn.Module) -> None:
    """Let the gated MLP of each layer that is not checkpointed make its activation again in the backward pass."""
    for mlp in layer_mlps(model, checkpointed=False):
        if all(hasattr(mlp, name) for name in PARTS):
            mlp.forward = partial(_forward, mlp)


def _forward(mlp: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)
    return mlp.down_proj(GatedActivation.apply(gate, up, mlp.act_fn))


class GatedActivation(torch.autograd.Function):
    """`act_fn(gate) * up`, element by element."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor, act_fn: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act_fn = act_fn
        return act_fn(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        # The gradients take the place of what was saved: nobody else reads it, and a second backward pass through the
        # same graph is refused by autograd, which sees that it was written to.
        gate, up = ctx.saved_tensors
        tiles = (x.tensor_split(NUM_TILES) for x in (gate.view(-1), up.view(-1), gradient.flatten()))
        for gate_tile, up_tile, gradient_tile in zip(*tiles, strict=True):
            _replace_by_gradients(gate_tile, up_tile, gradient_tile, ctx.act_fn)
        return gate, up, None


def _replace_by_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, act_fn: nn.Module) -> None:
    leaf = gate.detach().requires_grad_()
    with torch.enable_grad():
        activation = act_fn.forward(leaf)  # without hooks: ZeRO-3's would see a module run that it does not expect
    (gate_gradient,) = torch.autograd.grad(activation, leaf, gradient * up)
    torch.mul(gradient, activation.detach(), out=up)
    gate.copy_(gate_gradient)
