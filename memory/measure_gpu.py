"""Measures a step on a GPU: the allocator's counters and what the device has to have, in a fresh process.

    measure_gpu(config, Strategy.from_flags("single"))

The step is train.py's, the batch memory_window's. A smaller card is emulated by a limit on what PyTorch may reserve.
"""

import os
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

import step
from child_processes import process_pool
from data.worst_case import worst_case_batch
from memory.launch import launched
from memory.strategy import Strategy
from memory.updates import accelerator_for, end_run, run_updates, watch_phases
from memory.zero import NUM_UPDATES
from utils import ALLOCATOR_VARIABLE, UserError, allocator_settings


def measure_gpu(
    config: step.StepConfig, strategy: Strategy, images_per_sample: int = 1, limit_bytes: int | None = None
) -> dict[str, Any]:
    """Peaks of a few updates, in bytes, and whether memory ran out.

    Args:
        limit_bytes: of the device, to emulate a smaller one; context and kernels count.

    Raises:
        UserError: something else computes on the GPU, or there is none for every process.
    """
    refuse_gpu_in_use()
    if strategy.world_size > 1:
        raise UserError(f"--world_size {strategy.world_size}: one process is measured; predict more than one")
    is_deepspeed = strategy.name.startswith("zero")
    launch = launched(strategy.deepspeed_config, splits_weights=strategy.name == "zero3", gpu=True)
    with launch if is_deepspeed else nullcontext():
        with process_pool() as pool:
            return pool.submit(measure_in_this_process, config, images_per_sample, limit_bytes).result()


def refuse_gpu_in_use() -> None:
    """Raise UserError where another process computes on the GPU: its memory would be taken for the step's."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.strip():
        raise UserError(f"the GPU is in use by process {done.stdout.split(',')[0]}: wait for it or stop it")


def measure_in_this_process(
    config: step.StepConfig, images_per_sample: int, limit_bytes: int | None
) -> dict[str, Any]:
    os.environ[ALLOCATOR_VARIABLE] = allocator_settings()  # before the first use of CUDA
    with redirect_stdout(sys.stderr):
        total_bytes = torch.cuda.mem_get_info()[1]
        context_bytes = used_bytes()
        accelerator = accelerator_for(config)
        is_deepspeed = accelerator.state.deepspeed_plugin is not None
        with torch.device("cuda") if not is_deepspeed else nullcontext():  # drawing numbers there is quick
            model = step.build_model(config, is_deepspeed)
        if not is_deepspeed and config.quantize == "none":
            # Back to where from_pretrained puts it, so that it comes to the GPU in the usual order. 4-bit weights are
            # made where they stay.
            model = model.cpu()
        if not is_deepspeed:  # ZeRO-3 splits weights on the GPU while it loads: that counts
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if limit_bytes is not None:
            torch.cuda.set_per_process_memory_fraction((limit_bytes - context_bytes) / total_bytes)
        peaks = PhasePeaks()
        try:
            model = model.train().cuda() if not is_deepspeed else model.train()
            batch = worst_case_batch(model.config, config, images_per_sample)
            batch = {name: tensor.cuda() for name, tensor in batch.items()}
            optimizer = step.build_optimizer(model, config.optim, learning_rate=1e-3)
            wrapped, optimizer = accelerator.prepare(model, optimizer)
            clear_device_cache()  # as train.py does
            watch_phases(accelerator, wrapped, peaks.enter_phase)
            run_updates(accelerator, wrapped, optimizer, batch, config, NUM_UPDATES)
            end_run(accelerator, wrapped, config, images_per_sample, "cuda", peaks.enter_phase)
        except torch.OutOfMemoryError as error:
            peaks.oom = str(error).partition("If reserved")[0].strip()
        peaks.enter_phase("end")
        reserved_at_end_bytes = torch.cuda.memory_reserved()
        return {
            "peak_allocated_bytes": max(peaks.allocated_bytes.values()),
            "peak_reserved_bytes": peaks.reserved_bytes,
            # What the allocator has given back before the evaluation was on the device at its peak.
            "device_bytes": used_bytes() - reserved_at_end_bytes + peaks.reserved_bytes,
            "host_bytes": psutil.Process().memory_info().rss,
            "context_bytes": context_bytes,
            "phases": peaks.allocated_bytes,
            "oom": peaks.oom,
            "gpu_name": torch.cuda.get_device_name(),
        }


class PhasePeaks:
    """The most that was allocated in each phase, from loading on."""

    def __init__(self) -> None:
        self.allocated_bytes: dict[str, int] = {}
        self.reserved_bytes = 0
        self.phase = "load"
        self.oom: str | None = None

    def enter_phase(self, phase: str) -> None:
        peak_bytes = torch.cuda.max_memory_allocated()
        self.allocated_bytes[self.phase] = max(peak_bytes, self.allocated_bytes.get(self.phase, 0))
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        self.phase = phase


def used_bytes() -> int:
    """What nvidia-smi would show while nothing else uses the GPU."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes
