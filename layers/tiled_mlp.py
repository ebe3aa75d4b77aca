"""Runs a frozen MLP in tiles, some tokens at a time, so that its wide activations never exist for all tokens.

MGM-2B's MLP is eight times as wide as its hidden states, and its backward pass holds five tensors of that width: 320
MiB for 2048 tokens. An MLP treats each token by itself, so it can run tile by tile and hold five such tensors of one
tile. Each tile is recomputed in the backward pass. That costs nothing extra in a checkpointed layer, whose MLP would
be recomputed anyway.

DeepSpeed (TiledMLP in runtime/sequence_parallel/ulysses_sp.py) and Liger (LigerTiledGEGLUMLP) tile MLPs too.
"""

import inspect
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


def tile_frozen_mlps(model: nn.Module, num_tiles: int) -> None:
    """Run the frozen MLPs of checkpointed layers in tiles wherever a gradient passes through them.

    An MLP with trained parameters is left alone: each tile would produce a gradient, where DDP and ZeRO expect one.
    """
    # A number of tiles, not of tokens: under ZeRO-3 every process must run the same modules equally often.
    for mlp in layer_mlps(model, checkpointed=True):
        is_frozen = not any(parameter.requires_grad for parameter in mlp.parameters())
        if is_frozen and takes_tokens_one_by_one(mlp):
            mlp.forward = partial(_forward, mlp.forward, num_tiles)


def takes_tokens_one_by_one(mlp: nn.Module) -> bool:
    """Whether it is made of linear layers and activations alone, and takes hidden states alone.

    Experts are not: their router deals out the tokens of a call. Dropout would drop others when a tile is recomputed.
    """
    arguments = list(inspect.signature(type(mlp).forward).parameters)[1:]
    parts = list(mlp.modules())
    having_weights = [part for part in parts if list(part.parameters(recurse=False))]
    return (
        len(arguments) == 1
        and all(isinstance(part, (nn.Linear, Conv1D)) for part in having_weights)
        and not any(isinstance(part, nn.ModuleList) or _drops_out(part) for part in parts)
    )


def _drops_out(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    calls_dropout = code is not None and "dropout" in code.co_names
    return calls_dropout and not isinstance(getattr(module, "dropout", None), nn.Dropout)  # one of torch's functions


def layer_mlps(model: nn.Module, checkpointed: bool) -> Iterator[nn.Module]:
    """The MLPs of the layers that are checkpointed, or of those that are not."""
    for layer in model.modules():
        mlp = getattr(layer, "mlp", None)
        is_layer = isinstance(layer, GradientCheckpointingLayer) and mlp is not None
        if is_layer and layer.gradient_checkpointing == checkpointed:
            yield mlp


def _forward(mlp: nn.Module, num_tiles: int, hidden_states: torch.Tensor) -> torch.Tensor:
    if not (torch.is_grad_enabled() and hidden_states.requires_grad) or hidden_states.dim() != 3:
        return mlp(hidden_states)
    kept = Kept()
    return TiledFunction.apply(KeptFunction.apply(hidden_states, kept), kept, mlp, num_tiles)


class Kept:
    """The link from KeptFunction, which saves the input, to TiledFunction's backward, which needs it."""

    ctx: FunctionCtx


class KeptFunction(torch.autograd.Function):
    """Saves its input and returns it.

    TiledFunction could save the input itself, but a custom function's saved tensors count from the end of its forward.
    Checkpointing recomputes a layer until the last saved tensor is there. Saved here, that is before the MLP, so the
    recomputation stops there and the MLP runs twice, not three times.
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
    """An MLP's output [B, T, D], computed tile by tile; the backward pass recomputes each tile."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_states: torch.Tensor, kept: Kept, mlp: nn.Module, num_tiles: int
    ) -> torch.Tensor:
        ctx.kept, ctx.mlp, ctx.num_tiles = kept, mlp, num_tiles
        device = hidden_states.device.type
        # Of the forward pass: in a backward pass it is off.
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
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
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                output = ctx.mlp(source)
            target.copy_(torch.autograd.grad(output, source, source_gradient)[0])
        return result, None, None, None


def tiles(hidden_states: torch.Tensor, num_tiles: int) -> tuple[torch.Tensor, ...]:
    """Views [1, tokens, D] of [B, T, D]. There are always `num_tiles` of them; the last ones may be empty."""
    return hidden_states.flatten(0, 1).unsqueeze(0).tensor_split(num_tiles, dim=1)
