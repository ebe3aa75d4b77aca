"""Measures on the CPU what memory/strategy.py predicts: real DeepSpeed or DDP over real processes, joined by gloo.

    measure_strategy(StepConfig(model="tiny", mixed_precision="no"), Strategy.from_flags("zero3", "param"))

Tensors that gloo's threads are the last to hold are released where the profiler does not see it. So what is there when
a step begins is counted by walking over all tensors, and only what the step adds comes from the profiler.
"""

import os
import sys
from contextlib import redirect_stdout

import torch
from transformers import get_scheduler

import train
from child_processes import process_pool
from data.worst_case import with_few_micro_batches, worst_case_batch
from memory.cpu_profile import bytes_in_use, memory_events, profile_memory, rise
from memory.stand_in import launched
from memory.strategy import Strategy
from memory.updates import end_run
from memory.zero import NUM_UPDATES
from utils import quiet_libraries


def measure_strategy(config: train.StepConfig, strategy: Strategy, images_per_sample: int = 1) -> int:
    """Bytes at the peak of rank 0's steady state and of what follows it.

    Device and host together: a CPU has one memory for both.
    """
    with launched(strategy.deepspeed_config, strategy.world_size, splits_weights=strategy.name == "zero3"):
        with process_pool(strategy.world_size) as pool:
            ranks = range(strategy.world_size)
            runs = [pool.submit(_measure, config, rank, strategy.world_size, images_per_sample) for rank in ranks]
            return [run.result() for run in runs][0]


def _measure(config: train.StepConfig, rank: int, world_size: int, images_per_sample: int) -> int:
    quiet_libraries()
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    with redirect_stdout(sys.stderr):
        accelerator = train.build_accelerator(with_few_micro_batches(config))
        is_deepspeed = accelerator.state.deepspeed_plugin is not None
        model = train.build_model(config, is_deepspeed).train()
        optimizer = train.build_optimizer(model, config.optim, learning_rate=1e-3)
        batch = worst_case_batch(model.config, config, images_per_sample)
        model, optimizer = accelerator.prepare(model, optimizer)
        scheduler = get_scheduler("constant", optimizer)
        peaks = []
        for _ in range(NUM_UPDATES * accelerator.gradient_accumulation_steps):
            before_bytes = bytes_in_use(model)
            with profile_memory() as profiler:
                with accelerator.accumulate(model):
                    train.training_step(
                        accelerator, model, optimizer, scheduler, batch, batch["labels"].numel(), config.max_grad_norm
                    )
            peaks.append(before_bytes + rise(memory_events(profiler)))
        before_bytes = bytes_in_use(model)
        with profile_memory() as profiler:
            end_run(accelerator, model, config, images_per_sample, "cpu", enter_phase=lambda phase: None)
        end_bytes = before_bytes + rise(memory_events(profiler))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return max(peaks[-1], end_bytes)
