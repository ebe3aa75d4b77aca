"""Gradient checkpointing of a layer, or its MLP, that costs the host little: torch's, without a hook for each saved
tensor.

torch.utils.checkpoint calls Python for each tensor that a layer saves: when it is saved, when it is computed again and
when it is used. On a fast GPU the host is too slow for that. Here the forward pass runs without a graph, so nothing is
saved; the backward pass runs the layer again with one, and goes back through it.

    checkpoint_with_less_work(model)    # once transformers' own is switched on; not under DeepSpeed or FSDP2
    checkpoint_mlps(model)              # those alone that models/checkpointing.py has chosen

The backward pass of a layer fills `.grad` itself, so torch.autograd.grad finds no gradients of its parameters. Layers
that have another input with a gradient than the first one, or something to hand on, are left to torch. What hooks take
out of a layer, such as a router's logits, has no gradient here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.modeling_layers import GradientCheckpointingLayer

from layers.autocast import autocast_now
from layers.frozen_linear import has_hooks
from layers.tiled_mlp import layers_with_mlp, recomputes_mlp, takes_tokens_one_by_one
from layers.unused_output import adds_mlp_to_residual, without_output


Output = torch.Tensor | tuple[torch.Tensor | None, ...]


def checkpoint_with_less_work(model: nn.Module) -> None:
    """Give the model's checkpointed layers, and MLPs, this file's checkpointing."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and (layer.gradient_checkpointing or recomputes_mlp(layer)):
            has_mlp_alone = recomputes_mlp(layer)
            part = layer.mlp if has_mlp_alone else layer
            is_trained = any(parameter.requires_grad for parameter in part.parameters())
            unused = layer.mlp if has_mlp_alone or adds_mlp_to_residual(layer) else None
            draws = not (has_mlp_alone and takes_tokens_one_by_one(part))  # these have no dropout
            layer._gradient_checkpointing_func = partial(
                _run, layer._gradient_checkpointing_func, is_trained, unused, draws
            )


def checkpoint_mlps(model: nn.Module) -> None:
    """Checkpoint the MLPs that are recomputed alone, by what their layers have for themselves: this file's
    checkpointing, or torch's."""
    for layer in layers_with_mlp(model):
        if recomputes_mlp(layer):
            layer.mlp.forward = partial(layer._gradient_checkpointing_func, layer.mlp.forward)


def _run(
    torchs: Callable[..., Output],
    is_trained: bool,
    mlp: nn.Module | None,
    draws: bool,
    run: Callable[..., Output],
    *args: Any,
) -> Output:
    """`torchs`: torch's checkpointing; `mlp`: whose output only the result depends on; `draws`: whether it may draw
    random numbers; `run`: the forward of the layer, with its keyword arguments, or of the MLP."""
    hidden_states, *others = args or (None,)
    if not torch.is_grad_enabled():
        return run(*args)
    captured = (*others, *getattr(run, "args", ())[1:], *getattr(run, "keywords", {}).values())
    if not isinstance(hidden_states, torch.Tensor) or not all(_is_constant(value) for value in captured):
        return torchs(run, *args)
    if not (is_trained or hidden_states.requires_grad):
        return run(*args)
    anchor = torch.empty(0, device=hidden_states.device, requires_grad=True)  # for a first layer's trained parameters
    return Checkpoint.apply(anchor, hidden_states, mlp, draws, run, others)


def _is_constant(value: object) -> bool:
    """Whether it needs no gradient, and the layer cannot hand on anything by it: some put their keys into a dict."""
    if isinstance(value, torch.Tensor):
        return not value.requires_grad
    if isinstance(value, tuple):
        return all(_is_constant(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


class RandomState:
    """The state of the random numbers, on the CPU and on a tensor's GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(tensor)

    @contextmanager
    def again(self, device_type: str) -> Iterator[None]:
        """That state, as long as the context lasts."""
        # fork_rng asks for a device that computes; the CPU's state is kept in any case.
        with torch.random.fork_rng(self.devices, device_type=device_type if self.devices else "cuda"):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=device_type)
            yield


class Checkpoint(torch.autograd.Function):
    """run(hidden_states, *others), whose graph is made in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        anchor: torch.Tensor,
        hidden_states: torch.Tensor,
        mlp: nn.Module | None,
        draws: bool,
        run: Callable[..., Output],
        others: list[Any],
    ) -> Output:
        ctx.mlp, ctx.run, ctx.others = mlp, run, others
        ctx.autocast = autocast_now(hidden_states.device.type)
        ctx.random_state = RandomState(hidden_states) if draws else None
        ctx.save_for_backward(hidden_states)
        output = run(hidden_states, *others)
        parts = output if isinstance(output, tuple) else (output,)
        if not all(part is None or isinstance(part, torch.Tensor) for part in parts):
            raise TypeError(f"a checkpointed layer returns {[type(part).__name__ for part in parts]}, not tensors")
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_states = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1])
        again = ctx.random_state.again(ctx.autocast[0]) if ctx.random_state is not None else nullcontext()
        is_unused = ctx.mlp is not None and not has_hooks(ctx.mlp)  # hooks may read the output
        unused = without_output(ctx.mlp) if is_unused else nullcontext()
        with again, torch.enable_grad(), torch.autocast(*ctx.autocast), unused:
            output = ctx.run(hidden_states, *ctx.others)
        parts = output if isinstance(output, tuple) else (output,)
        pairs = [(part, gradient) for part, gradient in zip(parts, gradients, strict=True) if gradient is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return None, hidden_states.grad, None, None, None, None
