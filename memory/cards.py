"""The cards that `--gpu` knows, and how one is found by its name.

A key is the card's name in lower case without spaces. Where there are cards of one name and several sizes, the others
than the usual one carry theirs: rtx4060ti and rtx4060ti-16gb.
"""

import re

import torch

from memory.gpus import (
    ADA,
    AMPERE,
    AMPERE_A100,
    AMPERE_ORIN,
    BLACKWELL,
    HOPPER,
    NCCL_BYTES,
    NCCL_PEER_BYTES,
    TURING,
    VOLTA,
    Gpu,
    specified,
)
from utils import GIB, MIB, UserError, suggestion


PCIE_3, PCIE_4, PCIE_5 = 15.75, 31.5, 63.0  # GB/s of 16 lanes; half of it where a card has 8
# What a driver keeps of a card of which no message was found: what it keeps of an RTX 5080 (vllm-project/vllm #14452).
RESERVE_GIB = 0.52


def gib(size: float) -> int:
    return int(size * GIB)


# Capacities are those of messages under Linux, and of several the smallest: newer drivers keep more. Windows shows
# nearly the nominal size. ECC takes a sixteenth of the memory of an A10, L4, L40S and T4.
GPUS = {
    # NVIDIA Ampere GA102 GPU Architecture (whitepaper 2.1); nvidia.com's pages of the 3050, 3060 and 3080 of 12 GB.
    "rtx3050": Gpu("RTX 3050, 8 GB", gib(8 - RESERVE_GIB), AMPERE, specified(18.2, 9.1, 224, PCIE_4 / 2, 20)),
    "rtx3050-6gb": Gpu("RTX 3050, 6 GB", gib(6 - RESERVE_GIB), AMPERE, specified(13.5, 6.8, 168, PCIE_4 / 2, 18)),
    "rtx3060": Gpu("RTX 3060, 12 GB", gib(11.75), AMPERE, specified(25.5, 12.7, 360, PCIE_4, 28),
                   "smy20011/dreambooth-gui #78"),
    "rtx3060ti": Gpu("RTX 3060 Ti, 8 GB", gib(8 - RESERVE_GIB), AMPERE, specified(32.4, 16.2, 448, PCIE_4, 38)),
    "rtx3070": Gpu("RTX 3070, 8 GB", gib(7.78), AMPERE, specified(40.6, 20.3, 448, PCIE_4, 46),
                   "akshitac8/OW-DETR #46"),
    "rtx3080": Gpu("RTX 3080, 10 GB", gib(9.78), AMPERE, specified(59.5, 29.8, 760, PCIE_4, 68),
                   "zai-org/CogVideo #34"),
    "rtx3080-12gb": Gpu("RTX 3080, 12 GB", gib(12 - RESERVE_GIB), AMPERE, specified(61.3, 30.6, 912, PCIE_4, 70)),
    "rtx3090": Gpu("RTX 3090, 24 GB", gib(23.59), AMPERE, specified(71.0, 35.6, 936, PCIE_4, 82),
                   "Stable-X/StableNormal #33"),
    # NVIDIA Ada GPU Architecture (whitepaper 2.1, appendix A), and nvidia.com's pages of the smaller ones.
    "rtx4060": Gpu("RTX 4060, 8 GB", gib(7.72), ADA, specified(30.2, 15.1, 272, PCIE_4 / 2, 24),
                   "longxiang-ai/TSGS #6"),
    "rtx4060ti": Gpu("RTX 4060 Ti, 8 GB", gib(8 - RESERVE_GIB), ADA, specified(44.1, 22.1, 288, PCIE_4 / 2, 34)),
    "rtx4060ti-16gb": Gpu("RTX 4060 Ti, 16 GB", gib(16 - RESERVE_GIB), ADA,
                          specified(44.1, 22.1, 288, PCIE_4 / 2, 34)),
    "rtx4070": Gpu("RTX 4070, 12 GB", gib(12 - RESERVE_GIB), ADA, specified(58.3, 29.1, 504, PCIE_4, 46)),
    "rtx4070tisuper": Gpu("RTX 4070 Ti Super, 16 GB", gib(16 - RESERVE_GIB), ADA,
                          specified(88.2, 44.1, 672, PCIE_4, 66)),
    "rtx4080": Gpu("RTX 4080, 16 GB", gib(16 - RESERVE_GIB), ADA, specified(97.5, 48.7, 716.8, PCIE_4, 76)),
    "rtx4090": Gpu("RTX 4090, 24 GB", gib(23.63), ADA, specified(165.2, 82.6, 1008, PCIE_4, 128),
                   "ali-vilab/VGen #104"),  # it says 23.64, the message of MGM-2B's user 23.63
    # NVIDIA RTX Blackwell GPU Architecture (whitepaper 1.1), and nvidia.com's pages of the 5060 and 5060 Ti.
    "rtx5060": Gpu("RTX 5060, 8 GB", gib(8 - RESERVE_GIB), BLACKWELL, specified(38.4, 19.2, 448, PCIE_5 / 2, 30)),
    "rtx5060ti": Gpu("RTX 5060 Ti, 16 GB", gib(16 - RESERVE_GIB), BLACKWELL,
                     specified(47.4, 23.7, 448, PCIE_5 / 2, 36)),
    "rtx5070": Gpu("RTX 5070, 12 GB", gib(12 - RESERVE_GIB), BLACKWELL, specified(61.7, 30.9, 672, PCIE_5, 48)),
    "rtx5070ti": Gpu("RTX 5070 Ti, 16 GB", gib(16 - RESERVE_GIB), BLACKWELL, specified(87.9, 43.9, 896, PCIE_5, 70)),
    "rtx5080": Gpu("RTX 5080, 16 GB", gib(15.48), BLACKWELL, specified(112.6, 56.3, 960, PCIE_5, 84),
                   "vllm-project/vllm #14452"),
    "rtx5090": Gpu("RTX 5090, 32 GB", gib(31.37), BLACKWELL, specified(209.5, 104.8, 1792, PCIE_5, 170),
                   "Wan-Video/Wan2.1 #465"),
    # NVIDIA's data sheets of these cards; where one gives products with sparsity, half of that.
    "rtxa4000": Gpu("RTX A4000, 16 GB", gib(15.61), AMPERE, specified(76.7, 19.2, 448, PCIE_4, 48),
                    "DengKaiCQ/VGGT-Long #6"),
    "rtxa5000": Gpu("RTX A5000, 24 GB", gib(24 - RESERVE_GIB), AMPERE, specified(111.1, 27.8, 768, PCIE_4, 64)),
    "rtxa6000": Gpu("RTX A6000, 48 GB", gib(47.54), AMPERE, specified(154.8, 38.7, 768, PCIE_4, 84),
                    "google-research/semivl #18"),
    "t4": Gpu("T4, 16 GB", gib(14.56), TURING, specified(65, 8.1, 320, PCIE_3, 40), "AlphaGPU/leetgpu-challenges #52"),
    "v100": Gpu("V100, 16 GB", gib(15.78), VOLTA, specified(125, 15.7, 900, PCIE_3, 80), "kchengiva/Shift-GCN #34"),
    "v100-32gb": Gpu("V100, 32 GB", gib(31.74), VOLTA, specified(125, 15.7, 900, PCIE_3, 80),
                     "liucongg/ChatGLM-Finetuning #73"),
    "a10": Gpu("A10, 24 GB", gib(21.99), AMPERE, specified(125, 31.2, 600, PCIE_4, 72), "zai-org/CogVLM #236"),
    "a100": Gpu("A100, 40 GB", gib(39.50), AMPERE_A100, specified(312, 19.5, 1555, PCIE_4, 108),
                "TianheWu/CoSeR #10"),
    "a100-80gb": Gpu("A100, 80 GB", gib(79.15), AMPERE_A100, specified(312, 19.5, 2039, PCIE_4, 108),
                     "vllm-project/vllm #4408"),
    "l4": Gpu("L4, 24 GB", gib(22.03), ADA, specified(121, 30.3, 300, PCIE_4, 58), "ArcInstitute/evo2 #190"),
    "l40s": Gpu("L40S, 48 GB", gib(44.42), ADA, specified(362.05, 91.6, 864, PCIE_4, 142),
                "stepfun-ai/Step-Video-T2V #8"),
    # torch.cuda.mem_get_info
    "h100": Gpu("H100, 80 GB", 85_017_493_504, HOPPER, specified(989.4, 66.9, 3350, PCIE_5, 132), is_measured=True),
    "h200": Gpu("H200, 141 GB", 143_156 * MIB, HOPPER, specified(989.4, 66.9, 4800, PCIE_5, 132), is_measured=True),
    # The size is the host's, as its own tools say. A copy from it reads and writes the same memory: half its rate.
    "jetsonagxorin": Gpu("Jetson AGX Orin, 64 GB", gib(61.37), AMPERE_ORIN, specified(42.5, 5.3, 204.8, 102.4, 16),
                         "rollthecloudinc/hedge #303", torch_name="Orin", shares_host_memory=True),
    "jetsonorinnano": Gpu("Jetson Orin Nano, 8 GB", gib(7.3), AMPERE_ORIN, specified(16.7, 2.1, 102, 51, 8),
                          "dusty-nv/jetson-containers #342", torch_name="Orin", shares_host_memory=True),
}  # fmt: skip


def _plain(name: str) -> str:
    """A name without what people write in several ways or leave out: the vendor, the series, spaces, the unit."""
    return re.sub(r"nvidia|geforce|tesla|jetson|rtx|gb$|[^a-z0-9]", "", name.lower().strip())


SPELLINGS = {spelling: key for key, gpu in GPUS.items() for spelling in (_plain(key), _plain(gpu.title))}


def find_gpu(name: str) -> str:
    """The key of a card that a user names: "rtx4090", "RTX 4090", "4090", "RTX 4090, 24 GB".

    Raises:
        UserError: there is no such card.
    """
    if _plain(name) not in SPELLINGS:
        hint = suggestion(name.lower(), GPUS)
        raise UserError(f"--gpu {name}: choose a card of docs/gpus.md, or give --budget_gib{hint}")
    return SPELLINGS[_plain(name)]


def this_gpu() -> str:
    """The key of the GPU that PyTorch uses, or of the one that is most like it."""
    found = torch.cuda.get_device_properties()
    return nearest_gpu(found.name, (found.major, found.minor), found.total_memory)


def nearest_gpu(name: str, capability: tuple[int, int], total_bytes: int) -> str:
    """The key for a card as PyTorch names it, "NVIDIA GeForce RTX 4090", else for one of its generation or of the one
    before; of several the nearest in memory. A laptop's card goes by its generation: its name is a larger card's."""
    full_name = _spaced(name)
    found = {key: name for key, gpu in GPUS.items() if (name := _spaced(gpu.torch_name or gpu.name)) in full_name}
    if found and " laptop " not in full_name:
        longest = max(found.values(), key=len)
        keys = [key for key, name in found.items() if name == longest]
    else:
        capabilities = [gpu.family.capability for gpu in GPUS.values()]
        generation = max((known for known in capabilities if known <= capability), default=min(capabilities))
        keys = [key for key, gpu in GPUS.items() if gpu.family.capability == generation]
    return min(keys, key=lambda key: abs(GPUS[key].capacity_bytes - total_bytes))


def _spaced(name: str) -> str:
    """The name's words in lower case, between spaces: " a10 " is not in " a100 sxm4 80gb "."""
    return f" {re.sub(r'[^a-z0-9]+', ' ', name.lower()).strip()} "


def overhead_bytes(gpu: str, strategy: str, world_size: int = 1) -> int:
    """What a process takes of the card besides PyTorch's memory: CUDA's context and kernels, NCCL's buffers."""
    family = GPUS[gpu].family
    nccl_bytes = NCCL_BYTES if strategy != "single" else 0
    if world_size > 1:
        nccl_bytes += NCCL_PEER_BYTES[strategy]
    return family.context_bytes + family.kernels_bytes + nccl_bytes
