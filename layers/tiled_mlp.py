"""Runs a frozen MLP over some tokens at a time, forward and backward, so that its wide activations are never whole.

An MLP's layers see each token by itself. MGM-2B's are eight times as wide as its hidden states, and the backward pass
of one layer holds five such tensors: 320 MiB for 2048 tokens. In tiles it holds five pieces of them.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer


def tile_frozen_mlps(model: nn.Module, num_tiles: int) -> None:
    """Let the MLP of each checkpointed layer run in tiles wherever a gradient passes through it, if it is frozen.

    One whose own parameters are trained is left alone: its gradients would come in pieces, where DDP and ZeRO expect
    one. Tiles are counted, not sized: under ZeRO-3 every process has to run the same modules equally often.
    """
    for mlp in layer_mlps(model, checkpointed=True):
        if not any(parameter.requires_grad for parameter in mlp.parameters()):
            mlp.forward = partial(_forward, mlp.forward, num_tiles)


def layer_mlps(model: nn.Module, checkpointed: bool) -> Iterator[nn.Module]:
    """The MLPs of the layers that are checkpointed, or of those that are not."""
    for layer in model.modules():
        mlp = getattr(layer, "mlp", None)
        if isinstance(layer, GradientCheckpointingLayer) and mlp is not None:
            if layer.gradient_checkpointing == checkpointed:
                yield mlp


def _forward(mlp: nn.Module, num_tiles: int, hidden_states: torch.Tensor) -> torch.Tensor:
    if not (torch.is_grad_enabled() and hidden_states.requires_grad):
        return mlp(hidden_states)
    kept = Kept()
    return TiledFunction.apply(KeptFunction.apply(hidden_states, kept), kept, mlp, num_tiles)


class Kept:
    """What KeptFunction has saved, for TiledFunction's backward."""

    ctx: FunctionCtx


class KeptFunction(torch.autograd.Function):
    """Saves its input and passes it on.

    TiledFunction could save it itself, but only once its forward is done. A checkpointed layer is recomputed up to the
    last tensor that was saved: saved here, that is before the MLP, which then is not run a third time.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_states: torch.Tensor, kept: Kept) -> torch.Tensor:
        ctx.save_for_backward(hidden_states)
        kept.ctx = ctx
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class TiledFunction(torch.autograd.Function):
    """An MLP's output [B, T, D] tile by tile; the backward pass runs each tile again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_states: torch.Tensor, kept: Kept, mlp: nn.Module, num_tiles: int
    ) -> torch.Tensor:
        ctx.kept, ctx.mlp, ctx.num_tiles = kept, mlp, num_tiles
        output = torch.empty_like(hidden_states)
        for source, target in zip(tiles(hidden_states, num_tiles), tiles(output, num_tiles), strict=True):
            target.copy_(mlp(source))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (hidden_states,) = ctx.kept.ctx.saved_tensors
        result = torch.empty_like(hidden_states)
        parts = (tiles(x, ctx.num_tiles) for x in (hidden_states, gradient, result))
        for source, source_gradient, target in zip(*parts, strict=True):
            source = source.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.mlp(source)
            target.copy_(torch.autograd.grad(output, source, source_gradient)[0])
        return result, None, None, None


def tiles(hidden_states: torch.Tensor, num_tiles: int) -> tuple[torch.Tensor, ...]:
    """Views of [B, T, D], each [1, tokens, D]; always `num_tiles` of them, the last ones may be empty."""
    return hidden_states.flatten(0, 1).unsqueeze(0).tensor_split(num_tiles, dim=1)
