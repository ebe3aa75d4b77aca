"""Gated MLPs with a backward pass of their own against plain ones: the same step, with less in memory."""

import pytest
import torch
from conftest import assert_same_gradients
from torch import nn
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3VLTextConfig,
    SmolLM3Config,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bitnet.modeling_bitnet import BitNetMLP
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5MLP
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP

import layers.gated_mlp
import step
from layers.gated_mlp import FrozenGatedMLP, GatedActivation, _in_place, fuse_gated_mlps, is_gated_mlp
from layers.quantization import quantize_linear
from layers.unused_output import without_output
from memory.config import ProbeConfig
from memory.trace import trace_single
from mgm.configuration_mgm import PRESETS
from models.loading import load_model


CONFIGS = {
    GemmaMLP: GemmaConfig,
    Gemma2MLP: Gemma2Config,
    Gemma3MLP: Gemma3TextConfig,
    LlamaMLP: LlamaConfig,
    MistralMLP: MistralConfig,
    Qwen2MLP: Qwen2Config,
    Qwen3MLP: Qwen3Config,
    Qwen3VLTextMLP: Qwen3VLTextConfig,
    Qwen3_5MLP: Qwen3_5TextConfig,
    SmolLM3MLP: SmolLM3Config,
}


class Layer(GradientCheckpointingLayer):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the gates that are activated on the way forward from now on."""
    shapes, activated = [], layers.gated_mlp._activated

    def counted(gate: torch.Tensor, *rest: object) -> torch.Tensor:
        shapes.append(gate.shape)
        return activated(gate, *rest)

    monkeypatch.setattr(layers.gated_mlp, "_activated", counted)
    return shapes


@pytest.mark.parametrize(
    ("flags", "num_layers"),
    [
        ({"gradient_checkpointing": False}, 4),
        # What is recomputed is run without its output, and activates nothing.
        ({"checkpoint_num_layers": 1, "checkpoint_num_mlps": 1}, 4),
        ({"gradient_checkpointing": False, "lora_target_modules": ["all-linear"]}, 4),
        ({"gradient_checkpointing": False, "lora_r": 0}, 4),
        ({}, 4),
        ({"mlp_tiles": 3}, 4 * 3),
    ],
)
def test_step_is_the_same(monkeypatch, tiny_step, flags, num_layers):
    """Loss and all trainable gradients within 1e-5, with and without checkpointing, and in tiles."""
    shapes = count_calls(monkeypatch)
    found = tiny_step(**flags)
    assert len(shapes) == num_layers
    monkeypatch.setattr(step, "fuse_gated_mlps", lambda model, reads_weights: None)
    expected = tiny_step(**flags)
    assert len(shapes) == num_layers
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("act_fn", "is_known"),
    [
        *((name, True) for name in ("silu", "swish", "gelu", "gelu_pytorch_tanh")),
        *(
            (name, False)
            for name in ("gelu_new", "gelu_python", "gelu_python_tanh", "quick_gelu", "relu", "tanh", "linear")
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(act_fn, is_known, dtype):
    """The gradients of torch's own are computed in place, of others by autograd: both as without this file."""
    torch.manual_seed(0)
    act_fn = ACT2FN[act_fn]
    assert (_in_place(act_fn) is not None) == is_known
    gate, up, gradient = (torch.randn(4, 37, dtype=dtype) for _ in range(3))
    inputs = gate.requires_grad_(), up.requires_grad_()
    expected = torch.autograd.grad(act_fn(gate) * up, inputs, gradient)
    found = torch.autograd.grad(GatedActivation.apply(gate * 1, up * 1, act_fn), inputs, gradient)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("act_fn", ["gelu_pytorch_tanh", "relu", "linear"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_mlp(is_quantized, act_fn, dtype):
    """One function against its layers one by one, biases and autocast too; then without the output."""
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96, hidden_act=act_fn, mlp_bias=True))
    mlp.requires_grad_(False)
    for name, part in list(mlp.named_children()) if is_quantized else []:
        if name != "act_fn":
            setattr(mlp, name, quantize_linear(part, dtype or torch.float32))
    hidden_states, gradient = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 64)

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = mlp(hidden_states * 1)
        return [output, *torch.autograd.grad(output, hidden_states, gradient.to(output.dtype))]

    expected = run()
    assert type(expected[0].grad_fn) is not FrozenGatedMLP._backward_cls
    fuse_gated_mlps(Layer(mlp))
    found = run()
    assert type(found[0].grad_fn) is FrozenGatedMLP._backward_cls
    tolerance = 1e-6 if dtype is None else 0.01
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    with without_output(mlp):
        output, of_hidden = run()
    assert output.shape == hidden_states.shape
    assert torch.equal(of_hidden, found[1])


@pytest.mark.parametrize("mlp_class", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlps_of_many_families(mlp_class, dtype):
    """Output and gradients in both precisions, of more pieces than they divide into; and without gradients."""
    torch.manual_seed(0)
    config = CONFIGS[mlp_class](hidden_size=32, intermediate_size=37)
    sizes = (config, 37) if mlp_class is Qwen3_5MLP else (config,)
    layer = Layer(mlp_class(*sizes)).to(dtype)
    hidden_states = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    inputs = [hidden_states, *layer.parameters()]

    def run() -> list[torch.Tensor]:
        output = layer.mlp(hidden_states)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    expected = run()
    plain_forward = layer.mlp.forward
    fuse_gated_mlps(layer)
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
    monkeypatch.setattr(step, "fuse_gated_mlps", lambda model, reads_weights: None)
    traces.append(trace_single(config))
    slim, plain = (trace.peak_bytes for trace in traces)
    text_config = load_model("tiny", torch.float32, "sdpa").config.text_config
    wide_bytes = 4 * 400 * config.per_device_train_batch_size * text_config.intermediate_size
    assert 0 <= (plain - slim) / wide_bytes - text_config.num_hidden_layers < 1


class ClampedMLP(nn.Module):
    """An MLP with Gemma's parts and another formula."""

    def __init__(self) -> None:
        super().__init__()
        for name, part in small_mlp(GemmaMLP).named_children():
            self.add_module(name, part)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activation = self.act_fn(self.gate_proj(hidden_states)).clamp(max=0.1)
        return self.down_proj(activation * self.up_proj(hidden_states))


class ScaledMLP(GemmaMLP):
    """A subclass of a known class, with another formula."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


def small_mlp(mlp_class: type[GemmaMLP]) -> GemmaMLP:
    return mlp_class(GemmaConfig(hidden_size=4, intermediate_size=8))


@pytest.mark.parametrize(
    "mlp", [small_mlp(ScaledMLP), ClampedMLP(), nn.Linear(4, 4)], ids=lambda mlp: type(mlp).__name__
)
def test_an_mlp_of_another_formula_is_left_alone(mlp):
    """Whatever its parts are called, it computes what it did before."""
    hidden_states = torch.randn(2, 3, 4)
    expected = mlp(hidden_states)
    fuse_gated_mlps(Layer(mlp))
    assert "forward" not in vars(mlp)
    assert torch.equal(mlp(hidden_states), expected)


def test_all_language_models_of_the_presets_are_known():
    """Otherwise they would keep a third wide tensor, and nobody would notice."""
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = AutoModel.from_config(preset().text_config)
        assert all(is_gated_mlp(module) for module in model.modules() if hasattr(module, "gate_proj"))


@pytest.mark.parametrize("mlp_class", [BitNetMLP, FalconH1MLP, Gemma3nTextMLP, SeedOssMLP])
def test_another_formula_is_told_apart(mlp_class):
    """A norm, a factor, a threshold, dropout: each of these has gate_proj, up_proj, act_fn and down_proj."""
    mlp = object.__new__(mlp_class)
    nn.Module.__init__(mlp)
    mlp.act_fn = nn.SiLU()
    assert not is_gated_mlp(mlp)
    mlp.__class__ = LlamaMLP
    assert is_gated_mlp(mlp)


@pytest.mark.parametrize("act_fn", [nn.PReLU(), nn.SiLU(inplace=True)])
def test_an_activation_that_is_trained_or_overwrites_its_input_is_left_alone(act_fn):
    mlp = small_mlp(GemmaMLP)
    mlp.act_fn = act_fn
    assert not is_gated_mlp(mlp)


def test_what_is_trained_later_gets_gradients():
    layer = Layer(small_mlp(GemmaMLP)).requires_grad_(False)
    fuse_gated_mlps(layer)
    layer.requires_grad_(True)
    layer.mlp(torch.randn(1, 3, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_an_mlp_trained_in_full_beside_lora(monkeypatch, tiny_step):
    """PEFT trains a copy of it inside a wrapper: the copy recomputes its activation too."""
    shapes = count_calls(monkeypatch)
    flags = {"trainable_modules": ["layers.0.mlp"], "gradient_checkpointing": False}
    found = tiny_step(**flags)
    assert len(shapes) == 4
    monkeypatch.setattr(step, "fuse_gated_mlps", lambda model, reads_weights: None)
    assert_same_gradients(found, tiny_step(**flags))
