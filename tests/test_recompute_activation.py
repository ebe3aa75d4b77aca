"""Gated MLPs that recompute their activation against plain ones: the same step, with less in memory."""

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

import step
from layers.recompute_activation import GatedActivation, is_gated_mlp, recompute_activations
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
    recompute_activations(Layer(mlp))
    assert "forward" not in vars(mlp)
    assert torch.equal(mlp(hidden_states), expected)


def test_a_checkpointed_layer_is_left_alone():
    layer = Layer(small_mlp(GemmaMLP))
    layer.gradient_checkpointing = True
    recompute_activations(layer)
    assert "forward" not in vars(layer.mlp)


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


def test_an_activation_with_weights_of_its_own_is_left_alone():
    mlp = small_mlp(GemmaMLP)
    mlp.act_fn = nn.PReLU()
    assert not is_gated_mlp(mlp)


def test_an_mlp_trained_in_full_beside_lora(monkeypatch, tiny_step):
    """PEFT trains a copy of it inside a wrapper: the copy recomputes its activation too."""
    shapes = count_calls(monkeypatch)
    flags = {"trainable_modules": ["layers.0.mlp"], "gradient_checkpointing": False}
    found = tiny_step(**flags)
    assert len(shapes) == 4
    monkeypatch.setattr(step, "recompute_activations", lambda model: None)
    assert_same_gradients(found, tiny_step(**flags))
