"""What a GPU holds, what a process needs of one besides its tensors, and how fast it is. Bytes; GiB = 2**30.

memory/cards.py has the table. `python memory_probe.py --calibrate` measures its figures where there is a GPU.
"""

from dataclasses import dataclass

from utils import GIB, MIB


@dataclass(frozen=True)
class Family:
    """A generation of GPUs.

    Args:
        capability: the compute capability, major and minor.
        context_bytes: of a process's CUDA context, before any kernel is used.
        kernels_bytes: of the kernels and libraries that a training step loads, on top of it.
        cublas_workspace_bytes: of each cuBLAS handle: PyTorch allocates it like a tensor and keeps it.
        block_shared_bytes: the shared memory that a block of threads may use, by which kernels are chosen (CUDA C++
            Programming Guide, "Technical Specifications per Compute Capability").
    """

    capability: tuple[int, int]
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
    """A card.

    Args:
        title: its name, and its nominal size in GiB, which vendors call GB: "RTX 4060 Ti, 16 GB".
        capacity_bytes: the "total capacity" of PyTorch's messages: the nominal size less what ECC and the driver keep.
        family: its generation.
        speed: what large operations reach of it.
        source: whose message has the capacity, as "owner/repository #number"; empty: derived from the nominal size.
        torch_name: what PyTorch calls the card, where that is not the title's name.
        is_measured: its family's constants were measured on it.
        shares_host_memory: it has no memory of its own.
    """

    title: str
    capacity_bytes: int
    family: Family
    speed: Speed
    source: str = ""
    torch_name: str = ""
    is_measured: bool = False
    shares_host_memory: bool = False

    @property
    def name(self) -> str:
        return self.title.partition(",")[0]

    @property
    def has_bf16(self) -> bool:
        return self.family.capability >= (8, 0)

    @property
    def margin_bytes(self) -> int:
        """How far what the device needs, or what the card has, may be from a prediction because of these constants."""
        return 0 if self.is_measured else MARGIN_BYTES


# The default of CUBLAS_WORKSPACE_CONFIG is ":4096:2:16:8" (KiB), on Hopper and Blackwell 32 MiB
# (pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp, PyTorch 2.13; Blackwell: pytorch/pytorch #175344).
CUBLAS_DEFAULT, CUBLAS_HOPPER = 2 * 4 * MIB + 8 * 16 * 1024, 32 * MIB
# Measured on an H100, PyTorch 2.11, CUDA 13.0: 526.8 MiB before the first kernel, and after a step of MGM-2B 242 MiB
# more than the allocator had reserved, whatever the configuration. Taken for the other families too.
KERNELS = 242 * MIB
# Under every strategy but single, even with one process: NCCL's buffers and kernels, 578 MiB more.
NCCL_BYTES = 578 * MIB
# What they take more once there is a second process to talk to. DeepSpeed opens more than one communicator. Two H200s
# behind NVLink, PyTorch 2.11, CUDA 13.0 (results/gpu/scaling.json); ZeRO-1 is taken to be as ZeRO-2.
NCCL_PEER_BYTES = {"ddp": 270 * MIB, "fsdp2": 270 * MIB, "zero1": 754 * MIB, "zero2": 754 * MIB, "zero3": 468 * MIB}
HOPPER = Family((9, 0), int(526.8125 * MIB), KERNELS, CUBLAS_HOPPER, 227 * 2**10)
# RTX 6000 Ada, PyTorch 2.10, CUDA 13.0: 426 MiB (github.com/unslothai/unsloth-zoo/pull/1053)
ADA = Family((8, 9), 426 * MIB, KERNELS, CUBLAS_DEFAULT, 99 * 2**10)
# RTX 3090, PyTorch 2.7.1, CUDA 12.8: 256 MiB (github.com/invoke-ai/InvokeAI/issues/9413)
AMPERE = Family((8, 6), 256 * MIB, KERNELS, CUBLAS_DEFAULT, 99 * 2**10)
# T4: 135 MiB in use by the process beyond what PyTorch had reserved, kernels among them (Zheng-Chong/CatVTON #133).
TURING = Family((7, 5), 135 * MIB, KERNELS, CUBLAS_DEFAULT, 64 * 2**10)
# Of these no context is known: the largest that is. With kernels, processes had 501 MiB beyond PyTorch's reserve on an
# A100 (TianheWu/CoSeR #10) and 595 MiB on an RTX 5090 (Wan-Video/Wan2.1 #465), less than is counted here.
VOLTA = Family((7, 0), HOPPER.context_bytes, KERNELS, CUBLAS_DEFAULT, 96 * 2**10)
AMPERE_A100 = Family((8, 0), HOPPER.context_bytes, KERNELS, CUBLAS_DEFAULT, 163 * 2**10)
AMPERE_ORIN = Family((8, 7), HOPPER.context_bytes, KERNELS, CUBLAS_DEFAULT, 163 * 2**10)
BLACKWELL = Family((12, 0), HOPPER.context_bytes, KERNELS, CUBLAS_HOPPER, 99 * 2**10)
# How far the contexts differ that were measured before the first kernel, and how far drivers differ in what they leave
# of an RTX 4090: 23.64 GiB (3DTopia/Phidias-Diffusion #8) to 23.49 GiB (Sautenich/UAV-VLA #7).
MARGIN_BYTES = HOPPER.context_bytes - AMPERE.context_bytes + int((23.64 - 23.49) * GIB)

# What large operations reach of the vendor's figures. Of an H100's 989 TFLOP/s in bf16 a large product reaches 784
# (measured, PyTorch 2.11); the other shares are what copies reach as a rule. Other cards are taken to reach the same.
MATMUL_SHARE, MEMORY_SHARE, PCIE_SHARE = 784 / 989.4, 0.9, 0.8
KERNEL_SECONDS = 2e-6


def specified(
    matmul_tflops: float, fp32_tflops: float, memory_gb_per_second: float, pcie_gb_per_second: float, num: int
) -> Speed:
    """From the vendor's figures: dense products in bf16 (fp16 before Ampere) with sums in fp32, fp32 without tensor
    cores, memory, one direction of PCIe, and the number of multiprocessors."""
    return Speed(
        matmul_tflops * MATMUL_SHARE * 1e12,
        fp32_tflops * MATMUL_SHARE * 1e12,
        memory_gb_per_second * MEMORY_SHARE * 1e9,
        pcie_gb_per_second * PCIE_SHARE * 1e9,
        KERNEL_SECONDS,
        num,
    )
