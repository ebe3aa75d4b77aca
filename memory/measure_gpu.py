"""Measure a step on GPUs, each in a fresh process: the allocator's counters, and what the device needs in all.

The step is memory/probed_step.py's. A smaller card is emulated by a limit on what PyTorch may reserve.
"""

import os
import subprocess
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn

import step
from memory.cards import overhead_bytes
from memory.config import ProbeConfig
from memory.launch import in_fresh_process, launched, on_every_rank
from memory.probed_step import DEEPSPEED_UPDATES, ProbedStep, launched_accelerator
from memory.strategy import Strategy
from utils import UserError, counted, set_allocator


def measure_gpu(config: ProbeConfig, strategy: Strategy, limit_bytes: int | None = None) -> dict[str, Any]:
    """Peaks of a few updates, in bytes, and whether memory ran out: those of the first process, and of several in
    `last_rank` also those of the last.

    Args:
        limit_bytes: of the device, to emulate a smaller one; what is there beside PyTorch counts as predicted.

    Raises:
        UserError: something else computes on a GPU, or there are fewer GPUs than processes.
    """
    for index in range(min(strategy.world_size, torch.cuda.device_count())):
        refuse_gpu_in_use(index)
    return on_gpus(strategy, measure_this_process, config, limit_bytes)


def on_gpus(strategy: Strategy, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in the first of fresh processes, one for each GPU and as the strategy's launcher would
    start them; of several in `last_rank` also what it returns in the last.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    num_gpus = torch.cuda.device_count()
    if strategy.world_size > num_gpus:
        have = f"this machine has {counted(num_gpus, 'GPU')}"
        raise UserError(f"--world_size {strategy.world_size}: {have}; predict, or choose fewer processes")
    if strategy.name == "single":
        return in_fresh_process(function, *arguments)
    with launched(strategy, splits_weights=strategy.name == "zero3", gpu=True):
        first, *others = on_every_rank(function, strategy.world_size, *arguments)
    return first | ({"last_rank": others[-1]} if others else {})


def refuse_gpu_in_use(index: int = 0) -> None:
    """Raise UserError where another process computes on the GPU: its memory would be taken for the step's.

    A process on another GPU of the host does not count.
    """
    uuid = torch.cuda.get_device_properties(index).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.strip():
        raise UserError(f"the GPU is in use by process {done.stdout.split(',')[0]}: wait for it or stop it")


def measure_this_process(config: ProbeConfig, limit_bytes: int | None = None) -> dict[str, Any]:
    """What measure_gpu returns of one process. For a fresh one."""
    begin_on_gpu()
    total_bytes = torch.cuda.mem_get_info()[1]
    context_bytes = used_bytes()
    accelerator = launched_accelerator(config)
    model = build_as_loaded(config, accelerator)
    if limit_bytes is not None:
        left_bytes = limit_bytes - overhead_bytes(config.gpu, config.strategy, config.world_size)
        torch.cuda.set_per_process_memory_fraction(max(left_bytes, 0) / total_bytes)
    peaks = PhasePeaks()
    try:
        probed = ProbedStep.build(config, accelerator, on_device(model, accelerator), device="cuda")
        probed.prepare()
        clear_device_cache()  # as train.py does
        probed.watch_phases(peaks.enter_phase)
        probed.run_updates(DEEPSPEED_UPDATES)
        probed.end_run(peaks.enter_phase)
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


def begin_on_gpu() -> None:
    """What a process does before its first allocation: the allocator as in training, and its own GPU."""
    set_allocator()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def build_as_loaded(config: ProbeConfig, accelerator: Accelerator) -> nn.Module:
    """step.build_model's model, where from_pretrained would put it, and peaks that begin there."""
    if accelerator.state.deepspeed_plugin is not None:  # ZeRO-3 splits weights on the GPU while it loads: that counts
        return step.build_model(config, is_deepspeed=True)
    with torch.device("cuda"):  # drawing numbers there is quick
        model = step.build_model(config, is_deepspeed=False, is_fsdp=accelerator.is_fsdp2)
    if config.quantize == "none":  # 4-bit weights are made where they stay
        model = model.cpu()  # it comes to the GPU in the usual order
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return model


def on_device(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model, on the GPU unless the strategy brings it there part by part."""
    is_brought = accelerator.state.deepspeed_plugin is not None or accelerator.is_fsdp2
    return model if is_brought else model.cuda()


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
