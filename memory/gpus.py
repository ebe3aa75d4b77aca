"""What GPUs hold, and what a process needs of one besides its tensors. Bytes; GiB = 2**30, MiB = 2**20.

Capacities are those of PyTorch's own messages ("GPU 0 has a total capacity of ..."): a card's nominal size less what
the driver keeps. `python memory_probe.py --calibrate` measures this table's figures where there is a GPU.
"""

from dataclasses import dataclass

from utils import GIB, MIB


@dataclass(frozen=True)
class Family:
    """A generation of GPUs.

    Args:
        context_bytes: of a process's CUDA context, before any kernel is used.
        kernels_bytes: of the kernels and libraries that a training step loads, on top of it.
        cublas_workspace_bytes: of each cuBLAS handle: PyTorch allocates it like a tensor and keeps it.
        block_shared_bytes: the shared memory that a block of threads may use, by which kernels are chosen (CUDA C++
            Programming Guide, "Technical Specifications per Compute Capability").
    """

    context_bytes: int
    kernels_bytes: int
    cublas_workspace_bytes: int
    block_shared_bytes: int


@dataclass(frozen=True)
class Gpu:
    title: str
    capacity_bytes: int
    family: Family


# The default of CUBLAS_WORKSPACE_CONFIG is ":4096:2:16:8" (KiB), on Hopper 32 MiB
# (pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp, PyTorch 2.13).
CUBLAS_DEFAULT, CUBLAS_HOPPER = 2 * 4 * MIB + 8 * 16 * 1024, 32 * MIB
# Measured on an H100, PyTorch 2.11, CUDA 13.0: 526.8 MiB before the first kernel, and after a step of MGM-2B 242 MiB
# more than the allocator had reserved, whatever the configuration. Taken for the other families too.
KERNELS = 242 * MIB
# Under DDP and DeepSpeed, even with one process: NCCL's buffers and kernels, 578 MiB more.
NCCL_BYTES = 578 * MIB
HOPPER = Family(int(526.8125 * MIB), KERNELS, CUBLAS_HOPPER, 227 * 2**10)
# RTX 6000 Ada, PyTorch 2.10, CUDA 13.0: 426 MiB (github.com/unslothai/unsloth-zoo/pull/1053)
ADA = Family(426 * MIB, KERNELS, CUBLAS_DEFAULT, 99 * 2**10)
# RTX 3090, PyTorch 2.7.1, CUDA 12.8: 256 MiB (github.com/invoke-ai/InvokeAI/issues/9413)
AMPERE = Family(256 * MIB, KERNELS, CUBLAS_DEFAULT, 99 * 2**10)

GPUS = {
    "rtx4090": Gpu("RTX 4090, 24 GB", int(23.63 * GIB), ADA),  # a user's "CUDA out of memory"
    "rtx3090": Gpu("RTX 3090, 24 GB", int(23.70 * GIB), AMPERE),  # clovaai/deep-text-recognition-benchmark #386
    "rtxa4000": Gpu("RTX A4000, 16 GB", int(15.61 * GIB), AMPERE),  # DengKaiCQ/VGGT-Long #6
    "rtx3060": Gpu("RTX 3060, 12 GB", int(11.76 * GIB), AMPERE),  # TencentARC/PhotoMaker #47
    "rtx3070": Gpu("RTX 3070, 8 GB", int(7.78 * GIB), AMPERE),  # akshitac8/OW-DETR #46
    "h100": Gpu("H100, 80 GB", 85_017_493_504, HOPPER),  # torch.cuda.mem_get_info
}


def nearest_gpu(name: str, capability: tuple[int, int]) -> str:
    """The entry for a card as PyTorch names it ("NVIDIA GeForce RTX 4090"), or else one of its generation."""
    for key, gpu in GPUS.items():
        if gpu.title.partition(",")[0] in name:
            return key
    if capability >= (9, 0):
        return "h100"
    return "rtx4090" if capability == (8, 9) else "rtx3090"
