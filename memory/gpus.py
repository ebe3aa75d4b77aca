"""What GPUs hold, what a process needs of one besides its tensors, and how fast they are. Bytes; GiB = 2**30.

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
class Speed:
    """What large operations reach of a card.

    Args:
        matmul_flops: floating-point operations a second of a matrix product in 16 bits, with sums in fp32.
        fp32_flops: of one in fp32.
        memory_bytes_per_second: of the card's memory, read and written.
        pcie_bytes_per_second: from and to pinned host memory.
        kernel_seconds: of a kernel that has nothing to do, in a long row of them.
        num_multiprocessors: which share a kernel's work.
    """

    matmul_flops: float
    fp32_flops: float
    memory_bytes_per_second: float
    pcie_bytes_per_second: float
    kernel_seconds: float
    num_multiprocessors: int


@dataclass(frozen=True)
class Gpu:
    title: str
    capacity_bytes: int
    family: Family
    speed: Speed


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

# What large operations reach of the vendor's figures. Of an H100's 989 TFLOP/s in bf16 a large product reaches 784
# (measured, PyTorch 2.11); the other shares are what copies reach as a rule. Other cards are taken to reach the same.
MATMUL_SHARE, MEMORY_SHARE, PCIE_SHARE = 784 / 989.4, 0.9, 0.8
KERNEL_SECONDS = 2e-6


def specified(
    matmul_tflops: float, fp32_tflops: float, memory_gb_per_second: float, pcie_gb_per_second: float, num: int
) -> Speed:
    """From the vendor's figures: dense products in bf16 with sums in fp32, fp32 without tensor cores, memory, one
    direction of PCIe, and the number of multiprocessors."""
    return Speed(
        matmul_tflops * MATMUL_SHARE * 1e12,
        fp32_tflops * MATMUL_SHARE * 1e12,
        memory_gb_per_second * MEMORY_SHARE * 1e9,
        pcie_gb_per_second * PCIE_SHARE * 1e9,
        KERNEL_SECONDS,
        num,
    )


PCIE_4, PCIE_5 = 31.5, 63.0  # GB/s of 16 lanes
# Capacity: whose message it was. Speed: NVIDIA Ada GPU Architecture (whitepaper 2.1, appendix A); NVIDIA Ampere GA102
# GPU Architecture (whitepaper 2.1); data sheets of the RTX A4000 and the H100 SXM.
GPUS = {
    # a user's "CUDA out of memory"
    "rtx4090": Gpu("RTX 4090, 24 GB", int(23.63 * GIB), ADA, specified(165.2, 82.6, 1008, PCIE_4, 128)),
    # clovaai/deep-text-recognition-benchmark #386
    "rtx3090": Gpu("RTX 3090, 24 GB", int(23.70 * GIB), AMPERE, specified(71.0, 35.6, 936, PCIE_4, 82)),
    # DengKaiCQ/VGGT-Long #6
    "rtxa4000": Gpu("RTX A4000, 16 GB", int(15.61 * GIB), AMPERE, specified(76.7, 19.2, 448, PCIE_4, 48)),
    # TencentARC/PhotoMaker #47
    "rtx3060": Gpu("RTX 3060, 12 GB", int(11.76 * GIB), AMPERE, specified(25.5, 12.7, 360, PCIE_4, 28)),
    # akshitac8/OW-DETR #46
    "rtx3070": Gpu("RTX 3070, 8 GB", int(7.78 * GIB), AMPERE, specified(40.6, 20.3, 448, PCIE_4, 46)),
    # torch.cuda.mem_get_info
    "h100": Gpu("H100, 80 GB", 85_017_493_504, HOPPER, specified(989.4, 66.9, 3350, PCIE_5, 132)),
    # The same processor with more and faster memory: NVIDIA H200 data sheet.
    "h200": Gpu("H200, 141 GB", 143_156 * MIB, HOPPER, specified(989.4, 66.9, 4800, PCIE_5, 132)),
}


def nearest_gpu(name: str, capability: tuple[int, int]) -> str:
    """The entry for a card as PyTorch names it ("NVIDIA GeForce RTX 4090"), or else one of its generation."""
    for key, gpu in GPUS.items():
        if gpu.title.partition(",")[0] in name:
            return key
    if capability >= (9, 0):
        return "h100"
    return "rtx4090" if capability == (8, 9) else "rtx3090"
