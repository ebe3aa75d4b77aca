"""RMSNorm by PyTorch's own function, which a GPU computes in one kernel.

transformers writes the formula down: ten operators in the forward pass and fifteen in the backward pass, with tensors
in fp32 between them. `torch.nn.functional.rms_norm` computes the same, in fp32 inside, and saves its input alone.

    fuse_norms(model)

Only norms whose forward is one of the formulas below are changed, if their weight is frozen.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from layers.formula import is_formula


def fuse_norms(model: nn.Module) -> None:
    """Give the model's norms the forward of this file."""
    for module in model.modules():
        forward = _fused(module)
        if forward is not None and not any(p.requires_grad for p in module.parameters()):
            module.forward = partial(forward, module)


def _fused(module: nn.Module) -> Callable | None:
    if "forward" in vars(module) or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    forward, norm = type(module).forward, getattr(type(module), "_norm", None)
    if is_formula(forward, Llama.forward):
        return _llama
    if norm is not None and is_formula(forward, Gemma.forward) and is_formula(norm, Gemma._norm):
        return _gemma
    if norm is not None and is_formula(forward, Gemma4.forward) and is_formula(norm, Gemma4._norm):
        return _gemma_4
    return None


def _llama(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _rms_norm(module, x, module.weight, module.variance_epsilon)


def _gemma(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)
    return OnePlusWeight.apply(_rms_norm(module, x, None, module.eps), module.weight)


def _gemma_4(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _rms_norm(module, x, module.weight if module.with_scale else None, module.eps)


def _rms_norm(module: nn.Module, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is not None and weight.dtype != x.dtype:  # one kernel takes one dtype
        return type(module).forward(module, x)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight, eps)


class OnePlusWeight(torch.autograd.Function):
    """x * (1 + weight), in x's memory. Nothing is saved but the weight, which gets no gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.mark_dirty(x)
        return x.addcmul_(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return torch.addcmul(gradient, gradient, weight), None


class Llama:
    """The formula of Llama, Qwen, Mistral and others."""

    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Gemma:
    """The formula of Gemma 1 to 3 and Qwen3.5."""

    def _norm(self, x):  # noqa: ANN001, ANN202
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):  # noqa: ANN001, ANN201
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class Gemma4:
    def _norm(self, hidden_states):  # noqa: ANN001, ANN202
        mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
        return hidden_states * torch.pow(mean_squared, -0.5)

    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        normed_output = self._norm(hidden_states.float())
        if self.with_scale:
            normed_output = normed_output * self.weight.float()
        return normed_output.type_as(hidden_states)
