"""Rotary embeddings in few kernels against transformers' formula."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma import modeling_gemma
from transformers.models.glm4v import modeling_glm4v

from layers import fused_rotary
from layers.fused_rotary import fuse_rotary, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_formula(dtype: torch.dtype) -> None:
    """Output and gradients, with halves of the angles that differ: fp32 within 1e-5, bf16 within its rounding."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8).to(dtype) for heads in (4, 1))
    cos, sin = (torch.randn(2, 5, 8).to(dtype) for _ in range(2))
    weights = [torch.randn_like(x) for x in (q, k)]
    results = []
    for function in (rotate, fused_rotary.apply_rotary_pos_emb):
        inputs = [x.clone().requires_grad_() for x in (q, k)]
        outputs = function(*inputs, cos, sin)
        sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
        results.append([*outputs, *(x.grad for x in inputs)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_where_it_is_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into modules with this formula, and no other."""
    monkeypatch.setattr(modeling_gemma, "apply_rotary_pos_emb", modeling_gemma.apply_rotary_pos_emb)
    config = GemmaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = GemmaForCausalLM(config).eval()
    tokens = torch.arange(3, 10)[None]
    expected = model(tokens).logits
    fuse_rotary(model)
    assert modeling_gemma.apply_rotary_pos_emb is rotate
    torch.testing.assert_close(model(tokens).logits, expected)
    assert not fused_rotary._has_formula(modeling_glm4v)
