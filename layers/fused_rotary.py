"""Rotary embeddings in three kernels a tensor: transformers takes five, and nine in the backward pass.

    fuse_rotary(model)

Attention layers call a function of their own module for it. Where that function is the formula below, it is replaced
there, for all models of that module: what it returns stays the same.
"""

import sys
from types import ModuleType

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from layers.formula import is_formula


def fuse_rotary(model: nn.Module) -> None:
    """Let the model's attention layers rotate queries and keys by this file."""
    for name in {type(module).__module__ for module in model.modules()}:
        module = sys.modules[name]
        if _has_formula(module):
            module.apply_rotary_pos_emb = rotate


def _has_formula(module: ModuleType) -> bool:
    functions = [getattr(module, name, None) for name in ("apply_rotary_pos_emb", "rotate_half")]
    formulas = (apply_rotary_pos_emb, rotate_half)
    return all(f is not None and is_formula(f, formula) for f, formula in zip(functions, formulas, strict=True))


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B, H, T, D], each rotated by its position's angles, cos and sin [B, T, D]."""
    if cos.dtype != q.dtype or cos.dtype != k.dtype or cos.requires_grad:
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return RotateFunction.apply(q, cos, sin), RotateFunction.apply(k, cos, sin)


class RotateFunction(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _rotated(x, cos, -1, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _rotated(gradient, cos, 1, second, first), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sign: int, sin_1: torch.Tensor, sin_2: torch.Tensor) -> torch.Tensor:
    """[x_1 cos + sign x_2 sin_1, x_2 cos - sign x_1 sin_2]"""
    result = x * cos
    (x_1, x_2), (result_1, result_2) = x.chunk(2, dim=-1), result.chunk(2, dim=-1)
    result_1.addcmul_(x_2, sin_1, value=sign)
    result_2.addcmul_(x_1, sin_2, value=-sign)
    return result


def rotate_half(x):  # noqa: ANN001, ANN201
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):  # noqa: ANN001, ANN201
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
