"""Gated MLPs that make their activation again against plain ones: the same step, with less in memory."""

import pytest
import torch
from conftest import assert_same_gradients
from torch import nn
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import step
from layers.recompute_activation import GatedActivation, recompute_activations
from memory.config import ProbeConfig
from memory.trace import trace_single
from models.loading import load_model


class Layer(GradientCheckpointingLayer):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that GatedActivation is given from now on."""
    shapes, forward = [], GatedActivation.forward

    def counted(ctx: object, gate: torch.Tensor, *rest: object) -> torch.Tensor:
        shapes.append(gate.shape)
        return forward(ctx, gate, *rest)

    monkeypatch.setattr(GatedActivation, "forward", staticmethod(counted))
    return shapes


@pytest.mark.parametrize(
    ("flags", "num_layers"),
    [
        ({"gradient_checkpointing": False}, 4),
        ({"checkpoint_every_n_layers": 2}, 2),
        ({"gradient_checkpointing": False, "lora_target_modules": ["all-linear"]}, 4),
        ({"gradient_checkpointing": False, "lora_r": 0}, 4),
        ({}, 0),
    ],
)
def test_step_is_the_same(monkeypatch, tiny_step, flags, num_layers):
    """Loss and all trainable gradients within 1e-5, in the layers that are not checkpointed."""
    shapes = count_calls(monkeypatch)
    found = tiny_step(**flags)
    assert len(shapes) == num_layers
    monkeypatch.setattr(step, "recompute_activations", lambda model: None)
    expected = tiny_step(**flags)
    assert len(shapes) == num_layers
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("mlp_class", "config_class"),
    [(GemmaMLP, GemmaConfig), (LlamaMLP, LlamaConfig), (MistralMLP, MistralConfig), (Qwen2MLP, Qwen2Config)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlps_of_all_language_models(mlp_class, config_class, dtype):
    """Output and gradients in both precisions, of more pieces than they divide into; and without gradients."""
    torch.manual_seed(0)
    layer = Layer(mlp_class(config_class(hidden_size=32, intermediate_size=37))).to(dtype)
    hidden_states = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    inputs = [hidden_states, *layer.parameters()]

    def run() -> list[torch.Tensor]:
        output = layer.mlp(hidden_states)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    expected = run()
    plain_forward = layer.mlp.forward
    recompute_activations(layer)
    assert layer.mlp.forward is not plain_forward
    for found, tensor in zip(run(), expected, strict=True):
        assert (found - tensor).norm() <= 2 * torch.finfo(dtype).eps * tensor.norm()
    with torch.no_grad():
        assert torch.equal(layer.mlp(hidden_states), expected[0])


def test_a_second_backward_pass_is_refused():
    """What was saved has become the gradients: autograd says so instead of giving wrong numbers."""
    gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    output = GatedActivation.apply(gate * 1, up * 1, nn.SiLU()).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_quarter_less_is_kept(monkeypatch):
    """A layer keeps two wide tensors in place of three, and its backward pass needs fewer at a time."""
    config = ProbeConfig(
        mode="predict",
        device="cpu",
        model="tiny",
        mixed_precision="no",
        gradient_checkpointing=False,
        max_seq_len=400,
        lora_dropout=0.0,
        per_device_train_batch_size=32,
    )
    traces = [trace_single(config)]
    monkeypatch.setattr(step, "recompute_activations", lambda model: None)
    traces.append(trace_single(config))
    slim, plain = (trace.peak_bytes for trace in traces)
    text_config = load_model("tiny", torch.float32, "sdpa").config.text_config
    wide_bytes = 4 * 400 * config.per_device_train_batch_size * text_config.intermediate_size
    assert 0 <= (plain - slim) / wide_bytes - text_config.num_hidden_layers < 1


def test_other_layers_are_left_alone():
    """One that is checkpointed, and an MLP without a gate."""
    gated = Layer(GemmaMLP(GemmaConfig(hidden_size=4, intermediate_size=8)))
    gated.gradient_checkpointing = True
    for layer in (gated, Layer(nn.Linear(2, 2))):
        recompute_activations(layer)
        assert "forward" not in vars(layer.mlp)
