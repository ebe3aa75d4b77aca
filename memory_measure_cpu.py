"""Measures the peak memory of the steps that memory_trace.py predicts: the same code on the same batch, for real.

    measurement = measure_training(StepConfig(model="tiny", mixed_precision="no"))

Each measurement runs in a process of its own, so that nothing of an earlier one is in its way.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import train
from memory_window import probe_accelerator, run_updates, worst_case_batch
from quantization import state_tensors


@dataclass
class Measurement:
    """`events`: bytes of each allocation (positive) and release (negative) after the model and batch were there."""

    peak_bytes: int
    baseline_bytes: int
    events: list[int]


def measure_training(config: train.StepConfig, images_per_sample: int = 1) -> Measurement:
    """Run a few updates on the CPU in a fresh process and return their peak of allocated bytes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure_on_cpu, config, images_per_sample).result()


def measure_on_cpu(config: train.StepConfig, images_per_sample: int) -> Measurement:
    with probe_accelerator(config) as accelerator:
        model = train.build_model(config, is_deepspeed=False).train()
        optimizer = train.build_optimizer(model, config.optim, learning_rate=1e-3)
        batch = worst_case_batch(model.config, config, images_per_sample)
        states = [tensor for _, tensor in state_tensors(model)]
        tensors = [*model.parameters(), *model.buffers(), *states, *batch.values()]
        storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model, optimizer = accelerator.prepare(model, optimizer)
            run_updates(accelerator, model, optimizer, batch, config)
    baseline_bytes, events = sum(storages.values()), memory_events(profiler)
    return Measurement(baseline_bytes + rise(events), baseline_bytes, events)


def rise(events: list[int]) -> int:
    """The most that is in use above the beginning."""
    total = peak = 0
    for nbytes in events:
        total += nbytes
        peak = max(peak, total)
    return peak


def memory_events(profiler: profile) -> list[int]:
    """The allocator's events in the order of time. The profiler hangs them on the operators that made them."""
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    found = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [nbytes for _, nbytes in sorted(found, key=lambda pair: pair[0])]
