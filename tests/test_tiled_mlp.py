"""MLPs in tiles against whole ones: the same step, run no more often, with less in memory."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import assert_same_gradients
from torch import nn
from transformers import DeepseekV3Config, GPT2Config, LlamaConfig, MixtralConfig, SeedOssConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from layers.tiled_mlp import takes_tokens_one_by_one, tile_frozen_mlps, tiles, tiles_needed
from memory.config import ProbeConfig
from memory.trace import trace_single


MLPS_ALONE = {"checkpoint_num_layers": 0, "checkpoint_num_mlps": 4}


class Layer(GradientCheckpointingLayer):
    gradient_checkpointing = True

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def cpu_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(mode="predict", device="cpu", model="tiny", mixed_precision="no", **flags)


@pytest.fixture
def step(tiny_step: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., tuple[dict[str, torch.Tensor], Counter]]:
    """A step's loss and gradients, and how many tokens each MLP has seen."""

    def run(mlp_tiles: int, **flags) -> tuple[dict[str, torch.Tensor], Counter]:
        seen = Counter()

        def watch(model: nn.Module) -> None:
            for name, module in model.named_modules():
                if name.endswith("mlp.gate_proj"):
                    module.register_forward_hook(
                        lambda _, args, output, name=name: seen.update({name: args[0][..., 0].numel()})
                    )

        return tiny_step(watch, mlp_tiles=mlp_tiles, **flags), seen

    return run


@pytest.mark.parametrize("num_tiles", [2, 5, 100])
@pytest.mark.parametrize("flags", [{}, MLPS_ALONE], ids=str)
def test_step_is_the_same(step, num_tiles, flags):
    """Loss and all trainable gradients within 1e-5, also with more tiles than tokens."""
    expected, _ = step(1)
    found, _ = step(num_tiles, **flags)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("flags", [{}, MLPS_ALONE], ids=str)
def test_mlps_run_twice_not_three_times(step, flags):
    """Forward, and in the backward pass; the recomputation of a layer, or of an MLP alone, stops before the tiles."""
    _, seen = step(4, **flags)
    assert len(seen) == 4 and set(seen.values()) == {2 * 3 * 21}


@pytest.mark.parametrize(
    "flags", [{"gradient_checkpointing": False}, {"lora_target_modules": ["q_proj", "gate_proj"]}, {"lora_r": 0}]
)
def test_others_are_left_alone(step, flags):
    """Without checkpointing tiles would be recomputed for nothing, and a trained MLP's gradients would be lost."""
    whole, tiled = (step(num_tiles, **flags) for num_tiles in (1, 4))
    assert whole[1] == tiled[1]
    assert all(torch.equal(tiled[0][name], tensor) for name, tensor in whole[0].items())


def test_rows_that_do_not_follow_each_other():
    """Hidden states whose first two dimensions are exchanged: output and gradient as those of a copy."""
    torch.manual_seed(0)
    layer = Layer(LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)))
    layer.train().requires_grad_(False)
    tile_frozen_mlps(layer, 2, 15, torch.float32)
    hidden_states = torch.randn(5, 3, 16).transpose(0, 1).requires_grad_()
    copied = hidden_states.detach().contiguous().requires_grad_()
    torch.testing.assert_close(layer.mlp(hidden_states), layer.mlp(copied))
    gradients = [torch.autograd.grad(layer.mlp(x).square().sum(), x)[0] for x in (hidden_states, copied)]
    torch.testing.assert_close(*gradients)


def test_tiles_are_all_tokens_in_order():
    hidden_states = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    parts = tiles(hidden_states, 4)
    assert [part.shape for part in parts] == [(1, 3, 3), (1, 3, 3), (1, 2, 3), (1, 2, 3)]
    assert all(part.stride(0) == part.numel() for part in parts), "or a product of one row becomes one of a batch"
    assert torch.equal(torch.cat(parts, dim=1).view(2, 5, 3), hidden_states)
    assert len(tiles(hidden_states, 100)) == 100


@pytest.mark.parametrize(
    ("mlp", "expected"),
    [
        (LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=16)), True),
        (GPT2MLP(16, GPT2Config(n_embd=12, resid_pdrop=0.0)), True),
        (GPT2MLP(16, GPT2Config(n_embd=12, resid_pdrop=0.1)), False),
        (SeedOssMLP(SeedOssConfig(hidden_size=64, intermediate_size=16)), False),
        (MixtralSparseMoeBlock(MixtralConfig(hidden_size=64, intermediate_size=16, num_local_experts=2)), False),
        (DeepseekV3MoE(DeepseekV3Config(hidden_size=128, moe_intermediate_size=8, n_routed_experts=8)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_takes_tokens_one_by_one_is_tiled(mlp, expected):
    """Experts' routers see all tokens of a call, and a tile's dropout would be drawn anew in the backward pass."""
    assert takes_tokens_one_by_one(mlp) == expected


def test_tiling_lowers_the_predicted_peak():
    peaks = []
    for num_tiles in (1, 4):
        config = cpu_config(
            mlp_tiles=num_tiles,
            max_seq_len=400,
            per_device_train_batch_size=8,
        )
        trace = trace_single(config)
        peaks.append(max(total for total in trace.timeline()))
    assert peaks[1] < peaks[0]


def test_a_model_without_mlps_is_no_error():
    tile_frozen_mlps(nn.Linear(2, 2), 4, 8, torch.float32)
    assert tiles_needed(nn.Identity(), 8, torch.float32) == 0


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "expected"), [(2048, "bfloat16", 1), (2049, "bfloat16", 2), (8192, "float32", 8)]
)
def test_tiles_needed(num_tokens, dtype, expected):
    """Three tensors as wide as MGM-2B's MLP stay within 192 MiB, also where its weights are packed."""
    with torch.device("meta"):
        mlp = LlamaMLP(LlamaConfig(hidden_size=2048, intermediate_size=16384))
    mlp.gate_proj.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    assert tiles_needed(mlp, num_tokens, getattr(torch, dtype)) == expected
