"""LoRA in few kernels against PEFT's own: output, all gradients, dropout's mask."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from layers.fused_lora import LoraFunction, fuse_lora
from layers.quantization import quantize_linear


class Two(nn.Module):
    """Two layers that read the same input, and one that reads theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(24, 24, bias=bias) for bias in (False, True, False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.first(x)) * self.second(x))


def models(packed_for: torch.dtype | None = None, **flags: object) -> tuple[nn.Module, nn.Module]:
    """The same model twice, PEFT's way and fused; B is not zero. `packed_for`: in 4 bits, to compute in this dtype."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["first", "second", "third"], **({"lora_dropout": 0.0} | flags))
    model = Two()
    for name, linear in list(model.named_children()) if packed_for else []:
        setattr(model, name, quantize_linear(linear, packed_for))
    model.is_loaded_in_4bit = packed_for is not None
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    return model, fused


def double(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def own_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: 2 * type(linear).forward(linear, x)


def train(linear: nn.Linear) -> None:
    linear.requires_grad_(True)


def step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(x * 1)
    output.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": output.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_it_is_pefts(flags: dict, dtype: torch.dtype | None) -> None:
    """fp32 within 1e-5, bf16 within its rounding; what is not plain LoRA goes PEFT's way."""
    x = torch.randn(3, 5, 24)
    expected, found = (step(model, x, dtype) for model in models(**flags))
    for name, value in expected.items():
        tolerance = 1e-5 if dtype is None else 0.03
        assert (found[name] - value).norm() <= tolerance * value.norm(), name
        assert found[name].dtype == value.dtype, name


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 5, 24)], ids=str)
@pytest.mark.parametrize("is_exchanged", [False, True])
def test_shapes(shape: tuple[int, ...], is_exchanged: bool) -> None:
    """Any number of dimensions, in any order in memory."""
    torch.manual_seed(2)
    x = torch.randn(shape)
    x = x.transpose(0, -2).contiguous().transpose(0, -2) if is_exchanged and x.dim() > 1 else x
    expected, found = (step(model, x, None) for model in models(lora_dropout=0.0))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_four_bits(dtype: torch.dtype | None) -> None:
    x = torch.randn(3, 5, 24)
    model, fused = models(packed_for=dtype or torch.float32)
    assert type(fused(x).grad_fn) is LoraFunction._backward_cls
    expected, found = step(model, x, dtype), step(fused, x, dtype)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= (1e-5 if dtype is None else 0.03) * value.norm(), name


@pytest.mark.parametrize("changes", [lambda m: m.register_forward_hook(double), own_forward, train], ids=str)
def test_a_frozen_layer_that_is_changed_later(changes: Callable[[nn.Module], object]) -> None:
    """A hook, a forward of its own, training: all as PEFT has it."""
    both = models()
    for model in both:
        changes(model.base_model.model.first.base_layer)
    x = torch.randn(2, 24)
    expected, found = (step(model, x, None) for model in both)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_large_scale_in_fp16() -> None:
    """B is 0 at first, and what A makes of the input fits: no infinity times 0."""
    _, fused = models(lora_alpha=64)
    for name, parameter in fused.named_parameters():
        nn.init.constant_(parameter, 0.5 if "lora_A" in name else 0.0)
    with torch.autocast("cpu", torch.float16):
        assert fused.base_model.model.first(torch.full((2, 24), 500.0)).isfinite().all()


def test_dropout() -> None:
    """A dropped input reaches neither the output nor a gradient; the others are scaled."""
    _, model = models(lora_dropout=0.5)
    layer = model.base_model.model.first
    torch.manual_seed(3)
    x = torch.randn(7, 24, requires_grad=True)
    output = layer(x)
    torch.manual_seed(3)
    torch.randn(7, 24)
    dropped, mask = torch.native_dropout(x.detach(), 0.5, True)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    scale = layer.scaling["default"]
    torch.testing.assert_close(output, layer.base_layer(x) + scale * dropped @ a.T @ b.T)
    output.sum().backward()
    of_lora = (torch.ones_like(output) @ b @ a) * scale * mask / 0.5
    torch.testing.assert_close(x.grad, torch.ones_like(output) @ layer.base_layer.weight + of_lora)
    torch.testing.assert_close(a.grad, scale * (torch.ones_like(output) @ b).T @ dropped)
    model.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ a.T @ b.T)


def test_merged_and_disabled() -> None:
    model, fused = models()
    x = torch.randn(2, 24)
    with fused.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(fused(x), model(x))
    expected = model(x)
    torch.testing.assert_close(fused.merge_and_unload()(x), expected)
