"""Measure a step's peak on a CPU, by PyTorch's profiler: one process, or real DeepSpeed or DDP over gloo."""

import gc

import torch

from layers.quantization import state_tensors
from memory.config import ProbeConfig
from memory.cpu_profile import bytes_in_use, memory_events, profile_memory, rise, storage_bytes
from memory.launch import in_fresh_process, launched, on_every_rank
from memory.probed_step import DEEPSPEED_UPDATES, ProbedStep, launched_accelerator, local_accelerator
from memory.strategy import Strategy


def measure_cpu(config: ProbeConfig, strategy: Strategy) -> int:
    """Bytes at the peak of rank 0, in fresh processes. Device and host together: a CPU has one memory for both."""
    if strategy.name == "single":
        # The fork server has imported what is needed, once; each measurement is a fork of it.
        return in_fresh_process(measure_single, config, method="forkserver", preload=__name__)
    with launched(strategy, splits_weights=strategy.name == "zero3"):
        return on_every_rank(measure_rank, strategy.world_size, config)[0]


def measure_single(config: ProbeConfig) -> int:
    """The peak of this process: what exists before the first update, and what the run adds."""
    gc.collect()  # the caller's garbage, freed while the profiler watches, would be taken off the peak
    with local_accelerator(config) as accelerator:
        probed = ProbedStep.build(config, accelerator)
        model = probed.model
        states = [tensor for _, tensor in state_tensors(model)]
        tensors = [*model.parameters(), *model.buffers(), *states, *probed.batch.values()]
        before_bytes = storage_bytes(tensors)
        with profile_memory() as profiler:
            probed.prepare()
            probed.run_updates()
            probed.end_run()
    return before_bytes + rise(memory_events(profiler))


def measure_rank(config: ProbeConfig) -> int:
    """The peak of a launched process in its steady state and at the end of a run.

    Tensors that gloo's threads are the last to hold are freed where the profiler does not see it. So what is there
    when a micro-batch begins is counted by walking over all tensors, and only what it adds comes from the profiler.
    """
    probed = ProbedStep.build(config, launched_accelerator(config))
    probed.prepare()
    questions_bytes = storage_bytes((probed.questions or {}).values())  # in a run the loader's, in shared memory
    for _ in range(DEEPSPEED_UPDATES * probed.accelerator.gradient_accumulation_steps):
        before_bytes = bytes_in_use(probed.model) - questions_bytes
        with profile_memory() as profiler:
            probed.micro_batch()
    step_bytes = before_bytes + rise(memory_events(profiler))
    before_bytes = bytes_in_use(probed.model) - questions_bytes
    with profile_memory() as profiler:
        probed.end_run()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return max(step_bytes, before_bytes + rise(memory_events(profiler)))
