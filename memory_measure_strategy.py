"""Measures on the CPU what memory_strategies.py predicts: real DeepSpeed or DDP over real processes, joined by gloo.

    measure_strategy(StepConfig(model="tiny", mixed_precision="no"), Strategy.from_flags("zero3", "param"))

Tensors that gloo's threads are the last to hold are released where the profiler does not see it. So what is there when
a step begins is counted by walking over all tensors, and only what the step adds comes from the profiler.
"""

import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import get_scheduler

import train
from data.worst_case import worst_case_batch
from memory_measure_cpu import memory_events, rise
from memory_stand_in import launch_environment
from memory_strategies import Strategy
from memory_zero import NUM_UPDATES


def measure_strategy(config: train.StepConfig, strategy: Strategy, images_per_sample: int = 1) -> int:
    """Bytes at the peak of rank 0's steady state, device and host together: a CPU has one memory for both."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free_port:
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps(strategy.deepspeed_config))
        environment = launch_environment(path, strategy.world_size)
        if not strategy.name.startswith("zero"):
            environment = {key: value for key, value in environment.items() if not key.startswith("ACCELERATE")}
        if strategy.name == "zero3":
            environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "true"
        free_port.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free_port.getsockname()[1])
        free_port.close()
        with patch.dict(os.environ, environment):
            with ProcessPoolExecutor(max_workers=strategy.world_size, mp_context=context) as pool:
                ranks = range(strategy.world_size)
                runs = [pool.submit(_measure, config, rank, strategy.world_size, images_per_sample) for rank in ranks]
                return [run.result() for run in runs][0]


def _measure(config: train.StepConfig, rank: int, world_size: int, images_per_sample: int) -> int:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    with redirect_stdout(sys.stderr):
        accelerator = train.build_accelerator(config)
        is_deepspeed = accelerator.state.deepspeed_plugin is not None
        model = train.build_model(config, is_deepspeed).train()
        optimizer = train.build_optimizer(model, config.optim, learning_rate=1e-3)
        batch = worst_case_batch(model.config, config, images_per_sample)
        model, optimizer = accelerator.prepare(model, optimizer)
        scheduler = get_scheduler("constant", optimizer)
        peaks = []
        for _ in range(NUM_UPDATES * accelerator.gradient_accumulation_steps):
            before_bytes = _bytes_in_use(model)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                with accelerator.accumulate(model):
                    train.training_step(
                        accelerator, model, optimizer, scheduler, batch, batch["labels"].numel(), config.max_grad_norm
                    )
            peaks.append(before_bytes + rise(memory_events(profiler)))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return peaks[-1]


def _bytes_in_use(model: nn.Module) -> int:
    """Bytes of all tensors of this process, and of DDP's buckets, which no Python object holds."""
    gc.collect()
    storages = {}
    for tensor in filter(lambda thing: isinstance(thing, torch.Tensor), gc.get_objects()):
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None:
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        buckets = [bucket.buffer() for bucket in model.reducer._get_zeros_like_grad_buckets()]
        return sum(storages.values()) + sum(bucket.nbytes for bucket in buckets)
    return sum(storages.values())
