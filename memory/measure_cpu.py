"""Measures the peak memory of the steps that memory/trace.py predicts: the same code on the same batch, for real.

    measurement = measure_training(StepConfig(model="tiny", mixed_precision="no"))

Each measurement runs in a process of its own, so that nothing of an earlier one is in its way.
"""

import gc
from dataclasses import dataclass

import train
from child_processes import process_pool
from data.worst_case import worst_case_batch
from layers.quantization import state_tensors
from memory.cpu_profile import memory_events, profile_memory, rise
from memory.updates import end_run, probe_accelerator, run_updates
from utils import quiet_libraries


@dataclass
class Measurement:
    """`events`: bytes of each allocation (positive) and release (negative) after the model and batch were there."""

    peak_bytes: int
    baseline_bytes: int
    events: list[int]


def measure_training(config: train.StepConfig, images_per_sample: int = 1) -> Measurement:
    """Run a few updates on the CPU in a fresh process and return their peak of allocated bytes."""
    # The server has imported what is needed, once; each measurement is a fork of it.
    with process_pool(method="forkserver", preload=__name__) as pool:
        return pool.submit(measure_on_cpu, config, images_per_sample).result()


def measure_on_cpu(config: train.StepConfig, images_per_sample: int) -> Measurement:
    quiet_libraries()
    gc.collect()  # garbage of the caller's that is freed while the profiler watches would be taken off the peak
    with probe_accelerator(config) as accelerator:
        model = train.build_model(config, is_deepspeed=False).train()
        optimizer = train.build_optimizer(model, config.optim, learning_rate=1e-3)
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
