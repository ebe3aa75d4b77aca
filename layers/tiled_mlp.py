"""Runs a frozen MLP in tiles, some tokens at a time, so that its wide activations never exist for all tokens.

MGM-2B's MLP is eight times as wide as its hidden states, and its backward pass holds three tensors of that width: 768
MiB for four rows of 2048 tokens. An MLP treats each token by itself, so it can run tile by tile and hold three such
tensors of one tile. Each tile is recomputed in the backward pass. That costs nothing extra where the MLP, or its
whole layer, would be recomputed anyway.

Small tiles are slow: a GPU needs some thousand tokens at a time to multiply at its full rate.

DeepSpeed (TiledMLP in runtime/sequence_parallel/ulysses_sp.py) and Liger (LigerTiledGEGLUMLP) tile MLPs too.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from layers.autocast import autocast_now
from layers.unused_output import output_is_unused, without_output
from utils import MIB


Run = Callable[[torch.Tensor], torch.Tensor]
TILE_BYTES = 192 * MIB  # what three tensors as wide as the MLP may take: 2048 tokens of MGM-2B in 16 bits


def tile_frozen_mlps(model: nn.Module, num_tiles: int, num_tokens: int, dtype: torch.dtype) -> None:
    """Run the frozen MLPs that are recomputed in tiles wherever a gradient passes through them.

    An MLP with trained parameters is left alone: each tile would produce a gradient, where DDP and ZeRO expect one.

    Args:
        num_tiles: 0: as few as keep a tile's wide tensors within TILE_BYTES.
        num_tokens: the most that a micro-batch has.
        dtype: of the MLP's activations.
    """
    # A number of tiles, not of tokens: under ZeRO-3 every process must run the same modules equally often.
    for layer in layers_with_mlp(model):
        is_frozen = not any(parameter.requires_grad for parameter in layer.mlp.parameters())
        is_recomputed = layer.gradient_checkpointing or recomputes_mlp(layer)
        if is_recomputed and is_frozen and takes_tokens_one_by_one(layer.mlp):
            number = num_tiles or tiles_needed(layer.mlp, num_tokens, dtype)
            if number > 1:
                layer.mlp.forward = partial(_forward, layer.mlp, layer.mlp.forward, number)


def tiles_needed(mlp: nn.Module, num_tokens: int, dtype: torch.dtype) -> int:
    """As few as keep a tile's wide tensors within TILE_BYTES."""
    widths = [part.out_features for part in mlp.modules() if isinstance(part, nn.Linear)]
    widths += [part.nf for part in mlp.modules() if isinstance(part, Conv1D)]
    return -(-3 * num_tokens * max(widths, default=0) * dtype.itemsize // TILE_BYTES)


def takes_tokens_one_by_one(mlp: nn.Module) -> bool:
    """Whether it is made of linear layers and activations alone, and takes hidden states alone.

    Experts are not: their router deals out the tokens of a call. Dropout would drop others when a tile is recomputed.
    """
    parts = list(mlp.modules())
    having_weights = [part for part in parts if list(part.parameters(recurse=False))]
    return (
        takes_hidden_states_alone(mlp)
        and all(isinstance(part, (nn.Linear, Conv1D)) for part in having_weights)
        and not any(isinstance(part, nn.ModuleList) or _drops_out(part) for part in parts)
    )


def takes_hidden_states_alone(mlp: nn.Module) -> bool:
    return len(inspect.signature(type(mlp).forward).parameters) == 2  # self, and them


def _drops_out(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    calls_dropout = code is not None and "dropout" in code.co_names
    return calls_dropout and not isinstance(getattr(module, "dropout", None), nn.Dropout)  # one of torch's functions


def layers_with_mlp(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and getattr(layer, "mlp", None) is not None:
            yield layer


def recomputes_mlp(layer: GradientCheckpointingLayer) -> bool:
    """Whether it is not checkpointed whole, but its MLP is (models/checkpointing.py)."""
    return getattr(layer, "recomputes_mlp", False)


def _forward(mlp: nn.Module, run: Run, num_tiles: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """`run`: the MLP's forward before it was given this one."""
    if not mlp.training or hidden_states.dim() != 3:
        return run(hidden_states)
    if not (torch.is_grad_enabled() and hidden_states.requires_grad):
        return _run_tiles(run, num_tiles, hidden_states)
    kept = Kept()
    return TiledFunction.apply(KeptFunction.apply(hidden_states, kept), kept, mlp, run, num_tiles)


def _run_tiles(run: Run, num_tiles: int, hidden_states: torch.Tensor) -> torch.Tensor:
    output = empty_like(hidden_states)
    for source, target in zip(tiles(hidden_states, num_tiles), tiles(output, num_tiles), strict=True):
        target.copy_(run(source))
    return output


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
        ctx: FunctionCtx, hidden_states: torch.Tensor, kept: Kept, mlp: nn.Module, run: Run, num_tiles: int
    ) -> torch.Tensor:
        ctx.kept, ctx.mlp, ctx.run, ctx.num_tiles = kept, mlp, run, num_tiles
        ctx.autocast = autocast_now(hidden_states.device.type)
        if output_is_unused(mlp):
            return empty_like(hidden_states)
        return _run_tiles(run, num_tiles, hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (hidden_states,) = ctx.kept.ctx.saved_tensors
        result = empty_like(hidden_states)
        parts = (tiles(x, ctx.num_tiles) for x in (hidden_states, gradient, result))
        for source, source_gradient, target in zip(*parts, strict=True):
            source = source.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(*ctx.autocast), without_output(ctx.mlp):
                output = ctx.run(source)
            target.copy_(torch.autograd.grad(output, source, source_gradient)[0])
        return result, None, None, None, None


def empty_like(hidden_states: torch.Tensor) -> torch.Tensor:
    """One row after the other in memory, so that its tiles are views of it."""
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def tiles(hidden_states: torch.Tensor, num_tiles: int) -> tuple[torch.Tensor, ...]:
    """Views [1, tokens, D] of [B, T, D], or of a copy in which the rows follow each other.

    There are always `num_tiles` of them; the last ones may be empty.
    """
    parts = hidden_states.flatten(0, 1).tensor_split(num_tiles)
    return tuple(part.unsqueeze(0) for part in parts)  # afterwards: the strides of one row make it a plain product
