"""What the CPU's fake run cannot tell about memory: kernels' workspaces, and where CUDA differs from the CPU.

A model of fake CPU tensors runs the CPU's choice of operators under the CPU's autocast. For a CUDA prediction
`kernels_of("cuda")` replaces what differs for a while; the tables below are all there is of it. Workspaces are what
a kernel allocates besides its outputs and frees before it returns.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from memory.allocator import MIN_BLOCK_BYTES
from memory.cards import GPUS
from memory.gpus import HOPPER
from memory.recorder import Workspace


aten = torch.ops.aten

# CUDA's autocast computes these in fp32, the CPU's in the dtype of their inputs; others do so on both
# (docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32").
CUDA_AUTOCAST_TO_FP32 = (
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "pow.Scalar", "rsqrt", "reciprocal", "exp", "expm1", "log", "log1p", "log2", "log10", "logsumexp", "softplus",
    "cosine_similarity", "linalg_vector_norm", "softmax.int", "log_softmax.int", "upsample_linear1d.vec",
    "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "_upsample_bilinear2d_aa.vec",
    "_upsample_bicubic2d_aa.vec",
)  # fmt: skip
# These widen while they add up: no copy of their input is made.
CUDA_AUTOCAST_FP32_OUTPUT = ("sum", "sum.dim_IntList", "cumsum", "cumprod")
# What a block needs of shared memory for the wider of the memory-efficient kernels.
WIDE_BLOCK_BYTES = 128 * 2**10
# On Hopper PyTorch prefers cuDNN's attention (from 9.15 on) for heads of up to that.
CUDNN_HEAD_DIM = 256


def _flash_backward(args: tuple) -> int:
    """The sum of dq in fp32; dk and dv for each query head where heads share keys (FlashAttention 2's backward)."""
    _, query, key, *_ = args
    rows, heads, length, head_dim = query.shape
    padded_length, padded_dim = _padded(length, 128), _padded(head_dim, 32 if head_dim <= 128 else 64)
    dq_sum = rows * heads * padded_length * (padded_dim + 1) * 4  # + 1: the row sums of dout * out
    expanded = 2 * rows * heads * key.shape[2] * head_dim * key.element_size() if key.shape[1] != heads else 0
    return dq_sum + expanded


def _efficient_backward(args: tuple, block_shared_bytes: int) -> int:
    """The row sums of dout * out, and sums in fp32: of dq always, of dk and dv where they are in 16 bits and too wide
    for a block's registers (CUTLASS's fMHA backward: mem_eff_attention/kernel_backward.h, kernels/cutlassB.h)."""
    _, query, key, value, *_ = args
    rows, heads, length, _ = query.shape
    width = max(query.shape[-1], value.shape[-1])
    num_queries, num_keys, has_room = _efficient_block(width, block_shared_bytes)
    dq_sum = _padded(length, num_queries) * _padded(width, num_keys)
    is_wide = query.element_size() == 2 and not has_room
    others = 2 * _padded(key.shape[2], num_keys) * _padded(width, num_queries) if is_wide else 0
    return rows * heads * (length + dq_sum + others) * 4


def _efficient_block(width: int, block_shared_bytes: int) -> tuple[int, int, bool]:
    """The queries and keys that a block takes at a time, and whether its registers hold dk and dv."""
    if width <= 64:
        return 64, 64, True
    if width > 128:  # cuDNN's kernel keeps dk and dv in 16 bits, at the price of dq's sum alone
        is_cudnn = block_shared_bytes >= HOPPER.block_shared_bytes and width <= CUDNN_HEAD_DIM
        return 128, 64, is_cudnn
    if block_shared_bytes >= WIDE_BLOCK_BYTES:
        return 128, 128, True
    return (128, 64, True) if width <= 96 else (64, 64, False)


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _masked_scatter(args: tuple) -> int:
    """The mask without strides of 0, and a running count of it in 64 bits (IndexKernel.cu, masked_scatter)."""
    return 9 * args[0].numel()


def _softmax_backward(args: tuple) -> int:
    """The gradient times the output (aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out)."""
    return args[0].numel() * args[0].element_size()


def _safe_softmax(args: tuple) -> int:
    """Where a score is minus infinity, and which rows have no other (ATen/native/SoftMax.cpp)."""
    scores, dim, *_ = args
    return scores.numel() + scores.numel() // scores.shape[dim]


def _dequantized(args: tuple, num_scales: int) -> int:
    """A 4-bit layer's whole weight in the input's dtype, and `num_scales` tensors of its blocks' scales in fp32.

    Source: bitsandbytes/backends, _gemm_4bit_default_impl and cuda's _dequant_linear_fallback, which holds the scales
    without their mean as well. On CUDA few tokens (at most 1536, depending on GPU and shape) go through a kernel that
    takes the packed weight; unpacking it is the worst case.
    """
    x, _, (rows, columns), _, block_size, *_ = args
    return rows * columns * x.element_size() + 4 * num_scales * -(-rows * columns // block_size)


def _cpu_attention(args: tuple) -> int:
    """Each thread's scores, their maxima and sums, and its part of the output, in fp32; in 16 bits the scores again
    (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, cpu_flash_attention)."""
    query, key, *_ = args
    rows, columns = _cpu_attention_block(query, key)
    scores = rows * columns * (4 + query.element_size() % 4)
    return torch.get_num_threads() * (scores + 4 * rows * (2 + query.shape[-1]))


def _cpu_attention_backward(args: tuple) -> int:
    """Each thread's scores and their gradients (cpu_flash_attention_backward)."""
    _, query, key, *_ = args
    rows, columns = _cpu_attention_block(query, key)
    return torch.get_num_threads() * (2 * rows * columns * (4 + query.element_size() % 4) + 4 * rows)


def _cpu_attention_block(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """The queries and keys that a CPU takes at a time."""
    length = query.shape[2]
    return min(length, 256 if length >= 768 else 64 if length >= 192 else 32), min(key.shape[2], 512)


def _promoted(args: tuple) -> int:
    """Copies of the tensors that are not in the dtype of the result, which a CPU makes before it starts
    (aten/src/ATen/TensorIterator.cpp, compute_types); a GPU converts each element as it reads it."""
    dtype = torch.result_type(*args[:2])
    tensors = (x for x in args[:2] if isinstance(x, torch.Tensor) and x.dtype != dtype)
    return sum(x.numel() * dtype.itemsize for x in tensors)


def _promoted_in_place(args: tuple) -> int:
    """The same, and the result before it is converted back."""
    first, dtype = args[0], torch.result_type(*args[:2])
    return _promoted(args) + (first.numel() * dtype.itemsize if first.dtype != dtype else 0)


def _converted_result(args: tuple) -> int:
    """The result in the dtype of the computation, where another one is asked for: `torch.exp(x, out=result)`."""
    x, *result = args
    return x.numel() * x.element_size() if result and result[0].dtype != x.dtype else 0


def _widened(args: tuple) -> int:
    """A copy in fp32 of what is scattered into, where that is in 16 bits (aten's scatter_stub on a CPU)."""
    return 4 * args[0].numel() if args[0].element_size() == 2 else 0


def _dropout_mask(args: tuple) -> int:
    """The mask in the gradient's dtype, scaled (aten/src/ATen/native/Dropout.cpp); a GPU's kernel needs none."""
    return args[0].numel() * args[0].element_size()


def _promoted_choice(args: tuple) -> int:
    """Of the two that `where` chooses from; on a GPU too."""
    return _promoted(args[1:]) if len(args) == 3 else 0


BLOCK_BYTES = {"cpu": 1, "cuda": MIN_BLOCK_BYTES}
# Left out: weights in oneDNN's own order, 0.4 % of the tiny model's peak when all of it is trained in bf16.
CPU_WORKSPACES: dict[str, Workspace] = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention_backward,
    "gemm_4bit": partial(_dequantized, num_scales=1),
    **dict.fromkeys(("add", "sub", "mul", "div"), _promoted),
    **dict.fromkeys(("add_", "sub_", "mul_", "div_"), _promoted_in_place),
    "exp": _converted_result,
    **dict.fromkeys(("scatter_", "scatter_add_"), _widened),
    "where": _promoted_choice,
    "_safe_softmax": _safe_softmax,
    "native_dropout_backward": _dropout_mask,
}


def workspaces_of(device_type: str, gpu: str) -> dict[str, Workspace]:
    """What operators allocate besides, on the device type; `gpu` is one of memory/cards.py's."""
    if device_type == "cpu":
        return CPU_WORKSPACES
    block_shared_bytes = GPUS[gpu].family.block_shared_bytes
    return {
        "_scaled_dot_product_flash_attention_backward": _flash_backward,
        "_scaled_dot_product_efficient_attention_backward": partial(
            _efficient_backward, block_shared_bytes=block_shared_bytes
        ),
        "_softmax_backward_data": _softmax_backward,
        "gemm_4bit": partial(_dequantized, num_scales=2),
        "where": _promoted_choice,
        "_safe_softmax": _safe_softmax,
        "masked_scatter": _masked_scatter,
        "masked_scatter_": _masked_scatter,
    }


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Let CPU tensors take the device type's operators."""
    if device_type == "cpu":
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        for names, wrapper in ((CUDA_AUTOCAST_TO_FP32, _in_fp32), (CUDA_AUTOCAST_FP32_OUTPUT, _to_fp32_output)):
            for name in names:
                library.impl(name, wrapper(overload_named(name)), "AutocastCPU")
        library.impl("dropout", _cuda_dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _cuda_attention, "AutogradCPU")
        library.impl("rms_norm", _cuda_rms_norm, "AutogradCPU")
        yield
    finally:
        library._destroy()


def use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """On CUDA an optimizer updates all parameters at once, with temporaries for all; on a CPU one after the other."""
    for group in optimizer.param_groups:
        group["foreach"] = True


def use_fused(optimizer: torch.optim.Optimizer) -> None:
    """What step.fuses_optimizer asks for on CUDA."""
    for group in optimizer.param_groups:
        group["fused"] = True


def overload_named(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _without_autocast() -> torch._C._ExcludeDispatchKeyGuard:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _in_fp32(op: Callable) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        def cast(x: Any) -> Any:
            return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        with _without_autocast():
            return op(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return kernel


def _to_fp32_output(op: Callable) -> Callable:
    def kernel(x: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        if dtype is None and x.is_floating_point():
            dtype = torch.float32
        with _without_autocast():
            return op(x, *args, dtype=dtype, **kwargs)

    return kernel


def _cuda_dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """One kernel that keeps a mask of a byte an element; the CPU keeps one of x's dtype."""
    return torch.native_dropout(x, p, train)[0] if train and p > 0 else x


def _cuda_rms_norm(
    x: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """One kernel if input and weight have one dtype (aten/src/ATen/native/layer_norm.cpp); else the formula."""
    if weight is None or weight.dtype == x.dtype:
        return _RmsNorm.apply(x, weight)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (eps or torch.finfo(x.dtype).eps))
    return (normed * weight).type_as(x)


class _RmsNorm(torch.autograd.Function):
    """It saves its input and a number for each row, in fp32. A copy stands for the kernel: it reads and writes as
    much."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return x.clone(memory_format=torch.contiguous_format), None if weight is None else weight.new_empty(
            weight.shape
        )


def _cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch's choice on a GPU from Ampere on: FlashAttention in 16 bits without a mask, else the memory-efficient
    kernel; that one does not share keys among heads, and then attention is computed step by step.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. On Hopper, with cuDNN from 9.15 on, PyTorch prefers
    cuDNN's attention for heads of up to 256. Only there can be seen what it allocates; here it counts as the kernel
    that it replaces, but for dk and dv in fp32.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    sizes = [x.shape[-1] for x in (query, key, value)]
    is_batch_of_heads = query.dim() == key.dim() == value.dim() == 4
    is_flash = query.dtype != torch.float32 and len(set(sizes)) == 1 and sizes[0] <= 256
    if is_batch_of_heads and attn_mask is None and is_flash:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    is_aligned = all(size * query.element_size() % 16 == 0 for size in sizes)
    if is_batch_of_heads and is_aligned and query.shape[1] == key.shape[1]:
        if attn_mask is not None:
            attn_mask = _attention_bias(attn_mask, query)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _attention_bias(attn_mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The mask as numbers to add, rows padded to a multiple of 8, for all heads without a copy."""
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    length = attn_mask.shape[-1]
    if length % 8:
        attn_mask = torch.nn.functional.pad(attn_mask, (0, 8 - length % 8))[..., :length]
    return attn_mask.expand(*query.shape[:3], length)
