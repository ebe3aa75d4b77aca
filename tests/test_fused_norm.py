"""RMSNorm in one kernel against transformers' formulas."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.ministral3.modeling_ministral3 import Ministral3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from layers.fused_norm import fuse_norms


CLASSES = [GemmaRMSNorm, Gemma3RMSNorm, Qwen3_5RMSNorm, Gemma4RMSNorm]
CLASSES += [LlamaRMSNorm, Qwen3VLTextRMSNorm, Ministral3RMSNorm]


def step(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = norm(x)
    (output.float() * torch.arange(x.shape[-1])).sum().backward()
    return output.detach(), x.grad


@pytest.mark.parametrize("norm_class", CLASSES, ids=lambda norm_class: norm_class.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_formula(norm_class: type[nn.Module], dtype: torch.dtype) -> None:
    """fp32 within 1e-5, bf16 within its rounding."""
    torch.manual_seed(0)
    norm = norm_class(32, eps=1e-5).requires_grad_(False)
    nn.init.normal_(norm.weight)
    fused = copy.deepcopy(norm.to(dtype))
    fuse_norms(fused)
    assert "forward" in vars(fused)
    x = (3 * torch.randn(2, 5, 32)).to(dtype)
    for found, expected in zip(step(fused, x), step(norm, x), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
    other = x.to(torch.float64 if dtype == torch.float32 else torch.float32)
    torch.testing.assert_close(fused(other), norm(other))


def test_what_is_not_fused() -> None:
    """A weight that is trained, and a forward that does anything else."""

    class Other(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    for norm in (LlamaRMSNorm(8), Other(8).requires_grad_(False), nn.LayerNorm(8).requires_grad_(False)):
        fuse_norms(norm)
        assert "forward" not in vars(norm)
