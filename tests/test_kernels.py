"""Where CUDA's kernels differ from the CPU's: what autocast widens, what autograd keeps, and workspaces by hand."""

import pytest
import torch
from torch import nn

from memory.cpu_profile import memory_events, profile_memory
from memory.kernels import kernels_of, workspaces_of


def test_autocast_of_cuda_and_of_the_cpu() -> None:
    """In bf16 under autocast a layer norm and a softmax are fp32 on CUDA, bf16 on the CPU, and a matrix product is
    bf16 on both. Afterwards everything is the CPU's again."""
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        for device_type, expected in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
            with kernels_of(device_type):
                assert nn.functional.layer_norm(x, (8,), weight.bfloat16()).dtype == expected
                assert x.softmax(-1).dtype == expected
                assert nn.functional.linear(x.float(), weight[None]).dtype == torch.bfloat16
        assert nn.functional.layer_norm(x, (8,), weight.bfloat16()).dtype == torch.bfloat16


def test_dropout_keeps_a_byte_an_element_on_cuda() -> None:
    """What autograd saves: a mask of bools on CUDA; on the CPU the noise, in x's dtype."""
    x = torch.ones(100, requires_grad=True)
    for device_type, expected in (("cuda", torch.bool), ("cpu", torch.float32)):
        saved = []
        with kernels_of(device_type), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            nn.functional.dropout(x, 0.5)
        assert [tensor.dtype for tensor in saved if tensor is not x] == [expected]


def test_workspaces_of_flash_attention() -> None:
    """By hand: 8 heads of 256 on one key head, 2048 positions in bf16. dq is summed in fp32, 8 x 2048 x (256 + 1) x 4
    bytes with the row sums; dk and dv are made for all 8 heads, 2 x 8 x 2048 x 256 x 2 bytes."""
    query, key = torch.empty(1, 8, 2048, 256, dtype=torch.bfloat16), torch.empty(1, 1, 2048, 256, dtype=torch.bfloat16)
    flash = workspaces_of("cuda", "h100")["_scaled_dot_product_flash_attention_backward"]
    assert flash((query, query, key)) == 8 * 2048 * 257 * 4 + 2 * 8 * 2048 * 256 * 2
    assert flash((query, query, query)) == 8 * 2048 * 257 * 4


@pytest.mark.parametrize(
    ("gpu", "width", "dtype", "floats"),
    [
        ("h100", 320, torch.bfloat16, 320 + 2 * 384),
        ("h100", 256, torch.bfloat16, 256),
        ("rtx4090", 256, torch.bfloat16, 3 * 256),
        ("h100", 128, torch.bfloat16, 128),
        ("rtx4090", 128, torch.bfloat16, 3 * 128),
        ("rtx4090", 72, torch.bfloat16, 128),
        ("h100", 64, torch.bfloat16, 64),
        ("h100", 256, torch.float32, 256),
    ],
)
def test_workspaces_of_memory_efficient_attention(gpu: str, width: int, dtype: torch.dtype, floats: int) -> None:
    """By hand: 8 heads, 2048 positions. A row has its sum, and dq in fp32, as wide as the head in whole blocks of 64
    or 128. In 16 bits dk and dv are summed in memory too, unless registers have the room: for heads of up to 64, and
    with a large block's shared memory up to 128."""
    query = torch.empty(1, 8, 2048, width, dtype=dtype)
    efficient = workspaces_of("cuda", gpu)["_scaled_dot_product_efficient_attention_backward"]
    assert efficient((query, query, query, query)) == 8 * 2048 * (1 + floats) * 4


def test_workspaces_of_a_cpus_attention() -> None:
    """Forward and backward of 300 positions in 4 heads of 16 allocate what the profiler sees, of both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.ones(2, 300, 4, 16, dtype=dtype).transpose(1, 2).requires_grad_()
        with profile_memory() as profiler:
            output = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            output.backward(torch.ones_like(output))
        sizes = [nbytes for nbytes in memory_events(profiler) if nbytes > 0]
        workspaces = workspaces_of("cpu", "h100")
        forward = workspaces["_scaled_dot_product_flash_attention_for_cpu"]((query, query, query))
        backward = workspaces["_scaled_dot_product_flash_attention_for_cpu_backward"]((output, query, query))
        is_half = dtype == torch.bfloat16
        num_threads = torch.get_num_threads()
        scores = 64 * 300 * num_threads
        of_forward = [forward - 2 * scores, 2 * scores] if is_half else [forward]
        of_backward = [2 * 4 * scores, *([2 * 2 * scores] if is_half else []), *[64 * 4] * num_threads]
        assert set(of_forward + of_backward) <= set(sizes) and backward == sum(of_backward)


def test_workspace_of_a_4_bit_layer() -> None:
    """By hand: MGM-2B's down_proj, whole in bf16 while it multiplies, and a scale of 4 bytes for each 64 weights,
    on CUDA with the mean of all scales and without."""
    x = torch.empty(1, 8, 16384, dtype=torch.bfloat16)
    for device_type, num_scales in (("cpu", 1), ("cuda", 2)):
        nbytes = workspaces_of(device_type, "h100")["gemm_4bit"]((x, None, (2048, 16384), None, 64, "nf4"))
        assert nbytes == 2 * 2048 * 16384 + num_scales * 4 * 2048 * 16384 // 64
