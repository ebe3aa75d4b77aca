"""What only a GPU can show: its attention kernels agree, and our step is the plain one there too.

On an RTX 30 or 40 PyTorch's FlashAttention has no backward pass for heads as wide as Gemma's; there its tests skip.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_mining
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers.chunked_loss import LanguageModelHead
from mgm.configuration_mgm import mgm_2b
from mgm.patch_info_mining import MGMPatchInfoMining


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
# Heads, key and value heads, length and width of Gemma-2B's attention, and of CLIP-L's.
SHAPES = {"gemma": (8, 1, 1024, 256), "clip": (16, 16, 577, 64)}


def attend(backend: SDPBackend | None, inputs: list[torch.Tensor], is_causal: bool, toward: torch.Tensor) -> list:
    """Output and gradients of attention by a kernel, or (None) step by step; keys repeated as transformers does."""
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    repeats = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if backend is not None:
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(query, keys, values, is_causal=is_causal)
    else:
        scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        if is_causal:
            length = query.shape[2]
            hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        output = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values
    return [output, *torch.autograd.grad((output * toward).sum(), (query, key, value))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, None])
def test_attention_kernels_agree(backend, shape, dtype):
    """Forward and backward against fp32 step by step, within a few of the dtype's roundings."""
    heads, key_heads, length, width = SHAPES[shape]
    if (
        backend is SDPBackend.FLASH_ATTENTION
        and width > 192
        and torch.cuda.get_device_capability() in ((8, 6), (8, 9))
    ):
        pytest.skip("PyTorch's FlashAttention has no backward pass for this width on this GPU")
    torch.manual_seed(0)
    sizes = [(2, heads, length, width), (2, key_heads, length, width), (2, key_heads, length, width)]
    inputs = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
    toward = torch.randn(sizes[0], device="cuda").to(dtype)
    is_causal = shape == "gemma"
    expected = attend(None, [x.float() for x in inputs], is_causal, toward.float())
    found = attend(backend, inputs, is_causal, toward)
    for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        error = ((one.float() - other).norm() / other.norm()).item()
        print(f"{backend} {shape} {dtype} {name}: {error:.2e}")
        assert error < 4 * torch.finfo(dtype).eps, name


def test_loss_without_logits():
    """MGM-2B's head in bf16, against fp32's logits: loss, and the gradient of the hidden states."""
    torch.manual_seed(0)
    head = LanguageModelHead(2048, 256_000, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    hidden_states = torch.randn(300, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(256_000, (300,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = head(hidden_states, targets)
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20  # the logits alone would be 440 MiB with fp32's
    (gradient,) = torch.autograd.grad(loss, hidden_states)
    wide = hidden_states.detach().float().requires_grad_()
    expected = F.cross_entropy(F.linear(wide, head.weight.float()), targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    assert abs(loss.item() / expected.item() - 1) < 1e-3
    assert ((gradient.float() - expected_gradient).norm() / expected_gradient.norm()).item() < 1e-2


def test_mining_from_the_querys_side():
    """At MGM-2B's real size under autocast, as far from fp32 as the original's form of it is."""
    torch.manual_seed(0)
    config = mgm_2b()
    mining = MGMPatchInfoMining(config).cuda()
    features = torch.randn(1, 576, 1024, device="cuda", dtype=torch.bfloat16)
    channels = config.vision_config_aux.hidden_sizes
    stages = [torch.randn(1, c, 192 >> i, 192 >> i, device="cuda") for i, c in enumerate(channels)]
    with torch.no_grad():
        expected = mining(features.float(), stages) - features.float()
        stages = [stage.bfloat16() for stage in stages]
        with torch.autocast("cuda", torch.bfloat16):
            found = mining(features, stages) - features
            plain = plain_mining(mining, features, stages)
    errors = [((x.float() - expected).norm() / expected.norm()).item() for x in (found, plain)]
    print(f"error of ours {errors[0]:.2e}, of the original's form {errors[1]:.2e}")
    assert errors[0] < max(2e-2, 2 * errors[1])
