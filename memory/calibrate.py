"""Measure the constants of memory/gpus.py: `python memory_probe.py --calibrate`, on a machine with that GPU.

A process uses more of the device than PyTorch reserves: the CUDA context before the first kernel, and after a training
step the kernels and libraries that it loaded. Under DeepSpeed NCCL's buffers come on top. Nothing else may use the GPU
meanwhile.
"""

from dataclasses import fields
from typing import Any

import torch

from memory.config import ProbeConfig
from memory.gpus import Family
from memory.launch import in_fresh_process
from memory.measure_gpu import measure_gpu
from memory.strategy import Strategy
from utils import GIB, UserError


def calibrate(config: ProbeConfig) -> dict[str, Any]:
    """The constants of this machine's GPU in bytes, from two steps of the configuration.

    Raises:
        UserError: there is no GPU, another process uses it, or the step runs out of memory.
    """
    if not torch.cuda.is_available():
        raise UserError("--calibrate: this machine has no GPU to measure")
    single, parallel = (_measure(config, name) for name in ("single", "zero2"))
    workspace_bytes = in_fresh_process(measure_cublas_workspace)
    return {
        "mode": "calibrate",
        "gpu_name": single["gpu_name"],
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "capacity_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cublas_workspace_bytes": workspace_bytes,
        "block_shared_bytes": torch.cuda.get_device_properties(0).shared_memory_per_block_optin,
    } | overheads(single, parallel)


def _measure(config: ProbeConfig, strategy_name: str) -> dict[str, Any]:
    measured = measure_gpu(config, Strategy.from_flags(strategy_name))
    if measured["oom"]:
        raise UserError(f"--calibrate: {measured['oom']}; choose a smaller --model or --max_seq_len")
    return measured


def overheads(single: dict[str, int], parallel: dict[str, int]) -> dict[str, int]:
    """What the device holds beyond PyTorch's reserve, from measurements of one process without and with DeepSpeed."""
    context_bytes = single["context_bytes"]
    besides = [run["device_bytes"] - run["peak_reserved_bytes"] - context_bytes for run in (single, parallel)]
    return {"context_bytes": context_bytes, "kernels_bytes": besides[0], "nccl_bytes": besides[1] - besides[0]}


def measure_cublas_workspace() -> int:
    """Bytes that the first matrix product leaves allocated. For a process of its own."""
    matrix = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    before_bytes = torch.cuda.memory_allocated()
    product = matrix @ matrix
    return torch.cuda.memory_allocated() - before_bytes - product.nbytes


def entry(result: dict[str, Any]) -> str:
    """The constants as lines of memory/gpus.py."""
    name, capacity_bytes = result["gpu_name"], result["capacity_bytes"]
    key = name.removeprefix("NVIDIA ").removeprefix("GeForce ").lower().replace(" ", "")
    parts = ", ".join(f"{field.name}={result[field.name]}" for field in fields(Family))
    return "\n".join(
        [
            f"# Measured: {name}, PyTorch {result['torch']}, CUDA {result['cuda']}",
            f"MEASURED = Family({parts})",
            f'"{key}": Gpu("{name}, {round(capacity_bytes / GIB)} GB", {capacity_bytes}, MEASURED),',
            f"NCCL_BYTES = {result['nccl_bytes']}",
        ]
    )
