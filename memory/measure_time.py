"""Measure the seconds of an update on a GPU, in a fresh process: what memory/step_time.py predicts.

The step is memory/probed_step.py's, with all of an update's micro-batches, and it waits for the gradients' norm as
train.py does.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import step
from memory.config import ProbeConfig
from memory.measure_gpu import begin_on_gpu, build_as_loaded, on_device, on_gpus, used_bytes
from memory.probed_step import ProbedStep
from memory.strategy import Strategy


WARM_UP_UPDATES = 4  # DeepSpeed fetches ahead from the second on, and kernels are chosen in the first
MIN_UPDATES, MAX_UPDATES, MAX_SECONDS = 5, 30, 5.0


def at_once() -> None:
    """Nothing to wait for."""


def measure_time(config: ProbeConfig, strategy: Strategy, wait: Callable[[], None] = at_once) -> dict[str, Any]:
    """The seconds of the first process's fastest update, what the host and the GPU do in it, how many kernels there
    are, and the memory of these updates; of several processes in `last_rank` also the last one's.

    The median of all updates stands beside it. Other programs on the machine slow the host down, most of all.
    `wait` is called in each process before it touches its GPU.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    return on_gpus(strategy, measure_time_here, config, wait)


def measure_time_here(config: ProbeConfig, wait: Callable[[], None]) -> dict[str, Any]:
    """What measure_time returns. For a fresh process."""
    wait()
    begin_on_gpu()
    accelerator = step.build_accelerator(
        config.mixed_precision,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.max_grad_norm,
    )
    model = on_device(build_as_loaded(config, accelerator), accelerator)
    probed = ProbedStep.build(config, accelerator, model, device="cuda")
    probed.prepare()
    clear_device_cache()  # as train.py does
    clock = PhaseClock()
    probed.watch_phases(clock.enter_phase)
    probed.run_updates(WARM_UP_UPDATES, waits_for_norm=True)
    updates: list[dict[str, float]] = []
    end = time.perf_counter() + MAX_SECONDS
    while len(updates) < MIN_UPDATES or (len(updates) < MAX_UPDATES and is_before(end)):
        torch.cuda.synchronize()
        clock.start()
        probed.run_updates(1, waits_for_norm=True)
        torch.cuda.synchronize()
        updates.append(clock.stop())
    memory = {  # before the profiler, which takes memory of its own
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        # What loading has needed and given back was on the device at its peak.
        "device_bytes": used_bytes() - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved(),
    }
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        probed.run_updates(1, waits_for_norm=True)
        torch.cuda.synchronize()
    on_gpu = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    kernels = [event.time_range.elapsed_us() for event in on_gpu if not event.is_user_annotation]
    fastest = min(updates, key=lambda update: sum(update.values()))
    return {
        "step_seconds": sum(fastest.values()),
        "median_seconds": median(sum(update.values()) for update in updates),
        "phase_seconds": fastest,
        "busy_seconds": sum(kernels) / 1e6,
        "num_kernels": len(kernels),  # copies and fills as well
        "num_updates": len(updates),
    } | memory


def is_before(end: float) -> bool:
    """By the first process's clock: all processes run the same updates."""
    return broadcast_object_list([time.perf_counter() < end])[0]


class PhaseClock:
    """How long the host is in each phase of an update. It does not wait for the GPU at the end of a phase, but in
    `step`: for the norm, and for all that is left."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase, self.since = "step", 0.0

    def start(self) -> None:
        self.seconds = dict.fromkeys(("forward", "backward", "step"), 0.0)
        self.phase, self.since = "step", time.perf_counter()

    def enter_phase(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def stop(self) -> dict[str, float]:
        """Seconds by phase; they add up to the update's."""
        self.enter_phase("step")
        return self.seconds
