"""Measures the peak memory of the steps that memory/trace.py predicts: the same code on the same batch, for real.

    measurement = measure_training(StepConfig(model="tiny", mixed_precision="no"))

Each measurement runs in a process of its own, so that nothing of an earlier one is in its way.
"""

import gc
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
from transformers import get_scheduler

import step
from child_processes import process_pool
from data.worst_case import worst_case_batch
from layers.quantization import state_tensors
from memory.cpu_profile import bytes_in_use, memory_events, profile_memory, rise
from memory.launch import launched
from memory.strategy import Strategy
from memory.updates import accelerator_for, end_run, probe_accelerator, run_updates
from memory.zero import NUM_UPDATES
from utils import quiet_libraries


@dataclass
class Measurement:
    """`events`: bytes of each allocation (positive) and release (negative) after the model and batch were there."""

    peak_bytes: int
    baseline_bytes: int
    events: list[int]


def measure_training(config: step.StepConfig, images_per_sample: int = 1) -> Measurement:
    """Run a few updates on the CPU in a fresh process and return their peak of allocated bytes."""
    # The server has imported what is needed, once; each measurement is a fork of it.
    with process_pool(method="forkserver", preload=__name__) as pool:
        return pool.submit(measure_on_cpu, config, images_per_sample).result()


def measure_on_cpu(config: step.StepConfig, images_per_sample: int) -> Measurement:
    quiet_libraries()
    gc.collect()  # garbage of the caller's that is freed while the profiler watches would be taken off the peak
    with probe_accelerator(config) as accelerator:
        model = step.build_model(config, is_deepspeed=False).train()
        optimizer = step.build_optimizer(model, config.optim, learning_rate=1e-3)
        batch = worst_case_batch(model.config, config, images_per_sample)
        states = [tensor for _, tensor in state_tensors(model)]
        tensors = [*model.parameters(), *model.buffers(), *states, *batch.values()]
        storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
        with profile_memory() as profiler:
            model, optimizer = accelerator.prepare(model, optimizer)
            run_updates(accelerator, model, optimizer, batch, config)
            end_run(accelerator, model, config, images_per_sample, "cpu", enter_phase=lambda phase: None)
    baseline_bytes, events = sum(storages.values()), memory_events(profiler)
    return Measurement(baseline_bytes + rise(events), baseline_bytes, events)


def measure_strategy(config: step.StepConfig, strategy: Strategy, images_per_sample: int = 1) -> int:
    """Bytes at the peak of rank 0's steady state and of what follows it.

    Device and host together: a CPU has one memory for both.
    """
    with launched(strategy.deepspeed_config, strategy.world_size, splits_weights=strategy.name == "zero3"):
        with process_pool(strategy.world_size) as pool:
            ranks = range(strategy.world_size)
            runs = [pool.submit(_measure, config, rank, strategy.world_size, images_per_sample) for rank in ranks]
            return [run.result() for run in runs][0]


def _measure(config: step.StepConfig, rank: int, world_size: int, images_per_sample: int) -> int:
    quiet_libraries()
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    with redirect_stdout(sys.stderr):
        accelerator = accelerator_for(config)
        is_deepspeed = accelerator.state.deepspeed_plugin is not None
        model = step.build_model(config, is_deepspeed).train()
        optimizer = step.build_optimizer(model, config.optim, learning_rate=1e-3)
        batch = worst_case_batch(model.config, config, images_per_sample)
        model, optimizer = accelerator.prepare(model, optimizer)
        scheduler = get_scheduler("constant", optimizer)
        peaks = []
        for _ in range(NUM_UPDATES * accelerator.gradient_accumulation_steps):
            before_bytes = bytes_in_use(model)
            with profile_memory() as profiler:
                with accelerator.accumulate(model):
                    step.training_step(
                        accelerator,
                        model,
                        optimizer,
                        scheduler,
                        batch,
                        num_items_in_batch=batch["labels"].numel(),
                        max_grad_norm=config.max_grad_norm,
                    )
            peaks.append(before_bytes + rise(memory_events(profiler)))
        before_bytes = bytes_in_use(model)
        with profile_memory() as profiler:
            end_run(accelerator, model, config, images_per_sample, "cpu", enter_phase=lambda phase: None)
        end_bytes = before_bytes + rise(memory_events(profiler))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return max(peaks[-1], end_bytes)
