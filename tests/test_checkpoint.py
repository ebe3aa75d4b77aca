"""Checkpointing with less work against torch's: the same step, dropout and autocast included."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import assert_same_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3TextConfig, GemmaConfig, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import layers.gated_mlp
from layers.checkpoint import Checkpoint, checkpoint_with_less_work
from layers.frozen_linear import frozen_linear
from layers.unused_output import adds_mlp_to_residual, without_output


class Layer(GradientCheckpointingLayer):
    """Dropout, a product under autocast, and an output besides the hidden states."""

    gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(16, 16), nn.Dropout(0.5)
        self.calls: list[bool] = []

    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor | float = 1.0, **kwargs: Any) -> tuple:
        self.calls.append(torch.is_grad_enabled())
        output = self.dropout(torch.tanh(self.linear(hidden_states))) * scale
        return output, None, output.sum()


def two_layers(less_work: bool) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer(), Layer()])
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    if less_work:
        checkpoint_with_less_work(layers)
    return layers.train()


def step(layers: nn.ModuleList, x: torch.Tensor, dtype: torch.dtype | None = None, **kwargs: Any) -> dict:
    torch.manual_seed(1)
    layers.zero_grad()
    loss = 0
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for layer in layers:
            x, _, added = layer(x, **kwargs)
            loss = loss + added
    loss = loss + x.square().sum()
    after = torch.rand(1)  # drawn after the forward pass
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layers.named_parameters()}
    return {"loss": loss.detach(), "after": after, "later": torch.rand(1)} | gradients


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_it_is_torchs(dtype: torch.dtype | None, needs_grad: bool) -> None:
    """Bit for bit: loss, gradients of input and parameters, and what is drawn afterwards. Also where the first layer's
    input needs no gradient: its own parameters do."""
    inputs = [torch.randn(3, 16, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    inputs = [x.requires_grad_(needs_grad) for x in inputs]
    expected, found = (step(two_layers(way), x, dtype) for way, x in zip((False, True), inputs, strict=True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if needs_grad:
        assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_a_layer_runs_without_a_graph_and_again_with_one() -> None:
    layers = two_layers(True)
    step(layers, torch.randn(3, 16))
    assert [layer.calls for layer in layers] == [[False, True]] * 2


def test_nothing_is_recomputed_for_a_frozen_layer() -> None:
    """If its input needs no gradient either."""
    layers = two_layers(True)
    layers[0].requires_grad_(False)
    checkpoint_with_less_work(layers)
    layers[0](torch.randn(3, 16))
    with torch.no_grad():
        layers[1](torch.randn(3, 16))
    assert layers[0].calls == [True] and layers[1].calls == [False]


@pytest.mark.parametrize("name", ["tensor", "dict"])
def test_what_is_handed_on_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another input with a gradient, and a dict, into which a layer may put its keys for others: torch does it."""
    scale = torch.ones(16, requires_grad=True)
    kwargs = {"scale": scale} if name == "tensor" else {"shared": {}}
    monkeypatch.setattr(Checkpoint, "forward", None)  # calling it would fail
    found = step(two_layers(True), torch.randn(3, 16), **kwargs)
    assert found["0.linear.weight"].any() and (name == "dict" or scale.grad.any())


def test_a_layer_that_returns_no_tensors_is_an_error() -> None:
    class Other(Layer):
        def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden_states": self.linear(hidden_states)}

    layers = nn.ModuleList([Other()])
    layers[0]._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    checkpoint_with_less_work(layers)
    with pytest.raises(TypeError, match=r"returns \['dict'\], not tensors"):
        layers[0](torch.randn(3, 16))


@pytest.mark.parametrize("flags", [{}, {"mlp_tiles": 3}, {"quantize": "nf4"}, {"lora_target_modules": ["down_proj"]}])
def test_a_step_is_the_same(monkeypatch: pytest.MonkeyPatch, tiny_step: Callable[..., dict], flags: dict) -> None:
    """Loss and all gradients of train.py's model, though no MLP's last product is computed again."""
    found = tiny_step(**flags)
    monkeypatch.setattr("step.checkpoint_with_less_work", lambda model: None)
    assert_same_gradients(found, tiny_step(**flags))


def test_the_last_product_is_computed_once(tiny_step: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass alone; what a graph needs of the MLP is computed twice."""
    kinds, calls = {}, Counter()

    def watch(model: nn.Module) -> None:
        kinds.update((module, name.rpartition(".")[2]) for name, module in model.named_modules())

    def counted(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        calls.update([kinds[linear]])
        return frozen_linear(x, linear)

    monkeypatch.setattr(layers.gated_mlp, "frozen_linear", counted)
    tiny_step(watch)
    assert calls == {"gate_proj": 8, "up_proj": 8, "down_proj": 4}
    calls.clear()
    tiny_step(watch, mlp_tiles=2)
    assert calls == {"gate_proj": 16, "up_proj": 16, "down_proj": 8}


def test_hooks_of_an_mlp_read_its_output(tiny_step: Callable[..., dict]) -> None:
    """So it is computed again too."""

    def watch(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith("layers.2.mlp"):
                module.register_forward_hook(lambda module, args, output: torch.tanh(output))

    assert_same_gradients(tiny_step(watch), tiny_step(watch, gradient_checkpointing=False))


@pytest.mark.parametrize(
    ("layer_class", "config", "expected"),
    [
        (LlamaDecoderLayer, LlamaConfig, True),
        (GemmaDecoderLayer, GemmaConfig, True),
        (Gemma3DecoderLayer, Gemma3TextConfig, False),  # a norm reads the MLP's output
    ],
)
def test_whose_mlps_output_nobody_reads(layer_class: type[nn.Module], config: type, expected: bool) -> None:
    with torch.device("meta"):
        assert adds_mlp_to_residual(layer_class(config(num_hidden_layers=1), 0)) == expected


class Scaled(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual * hidden_states
        return hidden_states


def test_another_ending_is_told_apart() -> None:
    with torch.device("meta"):
        assert not adds_mlp_to_residual(Scaled(LlamaConfig(), 0))
    assert not adds_mlp_to_residual(nn.Linear(2, 2))


def test_the_mark_is_taken_back() -> None:
    """Also after an error."""
    mlp = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), without_output(mlp):
        assert mlp.output_is_unused
        1 / 0  # noqa: B018
    assert not mlp.output_is_unused
