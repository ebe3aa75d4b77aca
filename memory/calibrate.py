"""Measure a card's entry of memory/cards.py: `python memory_probe.py --calibrate`, on a machine with that GPU.

A process uses more of the device than PyTorch reserves: the CUDA context before the first kernel, and after a training
step the kernels and libraries that it loaded. Under DeepSpeed NCCL's buffers come on top. Nothing else may use the GPU
meanwhile. How fast the card is, single operations tell, and how fast the host is, real steps.
"""

from dataclasses import asdict, fields, replace
from typing import Any

import torch

from memory.config import ProbeConfig
from memory.gpus import Family, Speed
from memory.launch import in_fresh_process
from memory.measure_gpu import measure_gpu
from memory.measure_speed import measure_speed
from memory.measure_time import measure_time
from memory.step_time import CONSTANTS, PYTHON, Constants, issue_seconds
from memory.strategy import Strategy
from memory.trace import trace_single
from memory.work import Operation
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
    speed = in_fresh_process(measure_speed)
    timed = measure_time(config, Strategy.from_flags("single"))
    record = trace_single(replace(config, mode="predict", device="cuda"))
    host = host_constants(record.work[-1], timed["phase_seconds"])
    return {
        "mode": "calibrate",
        "gpu_name": single["gpu_name"],
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "capacity_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cublas_workspace_bytes": workspace_bytes,
        "block_shared_bytes": torch.cuda.get_device_properties(0).shared_memory_per_block_optin,
        "speed": asdict(speed),
        "constants": asdict(host),
        "step_seconds": timed["step_seconds"],
    } | overheads(single, parallel)


def host_constants(operations: list[Operation], phase_seconds: dict[str, float]) -> Constants:
    """The host's constants, given how long it was in the forward and in the backward pass of an update that has these
    operations. The proportions of what Python does are kept. The GPU must not have held the host up, so the
    configuration should be a small one."""
    factor = phase_seconds["forward"] / issue_seconds(operations, "forward")
    names = (*PYTHON, "transfer_seconds", "packed_seconds")
    scaled = replace(CONSTANTS, **{name: factor * getattr(CONSTANTS, name) for name in names})
    by_python = issue_seconds(operations, "backward", replace(scaled, engine_seconds=0.0))
    num_by_engine = sum(not operation.is_python for operation in operations if operation.kind != "wait")
    return replace(scaled, engine_seconds=max(phase_seconds["backward"] - by_python, 0.0) / num_by_engine)


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
    """The constants as lines of memory/cards.py and memory/gpus.py."""
    name, capacity_bytes = result["gpu_name"], result["capacity_bytes"]
    title = f"{name}, {round(capacity_bytes / GIB)} GB"
    key = name.removeprefix("NVIDIA ").removeprefix("GeForce ").lower().replace(" ", "")
    parts = ", ".join(f"{field.name}={result[field.name]}" for field in fields(Family))
    speed, constants = (
        ", ".join(f"{field.name}={result[key][field.name]:.4g}" for field in fields(kind))
        for key, kind in (("speed", Speed), ("constants", Constants))
    )
    return "\n".join(
        [
            f"# Measured: {name}, PyTorch {result['torch']}, CUDA {result['cuda']}",
            f"MEASURED = Family({parts})",
            f"SPEED = Speed({speed})",
            f'"{key}": Gpu("{title}", {capacity_bytes}, MEASURED, SPEED, is_measured=True),',
            f"NCCL_BYTES = {result['nccl_bytes']}",
            "# And for memory/step_time.py:",
            f"CONSTANTS = Constants({constants})",
        ]
    )
