"""What kernels allocate besides their outputs, and where CUDA differs from the CPU."""
from collections.abc import Iterator
from contextlib import contextmanager
from memory_record import Workspace

import torch
CPU_WORKSPACES: dict[str, Workspace] = {}
CUDA_WORKSPACES: dict[str, Workspace] = {}

@contextmanager
def kernels_of(device_type: str) -> Iterator[dict[str, Workspace]]:
    yield CPU_WORKSPACES if device_type == "cpu" else CUDA_WORKSPACES

def use_foreach(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["foreach"] = True
