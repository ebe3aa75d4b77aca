"""Trace train.py's step under FSDP2, for any number of processes, on one computer without a GPU.

    record = trace_fsdp2(config, Strategy.from_flags("fsdp2", world_size=2))

As memory/zero.py does with DeepSpeed: what FSDP2 gathers, splits and frees is not known here. torch's own fully_shard
runs, on fake tensors and the fake process group. It differs in five things from a run on GPUs:

- its streams are a CPU's, which do nothing: here the recorder is told which one is the current one, because CUDA's
  allocator keeps a pool for each;
- gathered weights get their memory and lose it by resizing a storage, which is no operator: the recorder is told;
- the device is `cpu:0`, as in memory/stand_in.py;
- DTensor finds the shapes of whole results by fake tensors of its own, which must not be recorded;
- accelerate tells parameters apart by their address, which a fake tensor lacks: each gets a number.

Weights come to the device unit by unit, and are split at once. That is not recorded: a step has the same unit's
weights there twice, and all parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
import torch.distributed.fsdp._fully_shard._fsdp_param as parameters
import torch.distributed.fsdp._fully_shard._fully_shard as wrapper
from torch import nn
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from memory.config import ProbeConfig
from memory.kernels import BLOCK_BYTES, kernels_of, use_fused, workspaces_of
from memory.known import known_length
from memory.launch import in_fresh_process, launched
from memory.notes import noted
from memory.partly_fake import PartlyFakeMode
from memory.placed import PlacedRecord, PlacedRecorder, split_by_place
from memory.probed_step import ProbedStep, launched_accelerator, worst_case_inputs
from memory.stand_in import STAND_IN_DEVICE
from memory.strategy import Strategy
from memory.trace import build_fake_model, categorize, random_states, record_loaded, run_updates, watch_step
from models.fsdp2 import fsdp2_plugin, use_fsdp2


def trace_fsdp2(config: ProbeConfig, strategy: Strategy, rank: int = 0) -> PlacedRecord:
    """Trace the updates of one process in their steady state, on the largest batch that can come, in a fresh process.

    Raises:
        TraceError: the step does something whose memory depends on data.
        UserError: FSDP2 does not train such a step.
    """
    with launched(strategy):
        return in_fresh_process(trace_this_process, config, strategy.world_size, rank)


def trace_this_process(config: ProbeConfig, world_size: int, rank: int) -> PlacedRecord:
    """What trace_fsdp2 returns. For a fresh process: what is replaced here is not put back."""
    device = STAND_IN_DEVICE[config.device]
    inputs = worst_case_inputs(config)  # real
    fake_mode = PartlyFakeMode(device)
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    model = build_fake_model(config, fake_mode, device, is_fsdp=True)
    number_parameters(model)
    recorder = PlacedRecorder(model, device, workspaces_of(config.device, config.gpu), BLOCK_BYTES[config.device])
    fake_mode.in_model = recorder.is_in_model
    stand_in(recorder)
    accelerator = launched_accelerator(config)
    if config.device == "cuda":
        use_fsdp2(accelerator, fsdp2_plugin())
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # fake weights cannot be sent; how is not recorded
    with fake_mode, kernels_of(config.device), random_states(recorder, config.device):
        probed = ProbedStep.build(config, accelerator, model, device, inputs)
        optimizer = probed.optimizer
        if config.device == "cuda" and config.optim != "sgd":  # as step.fuses_optimizer
            use_fused(optimizer)
        record_loaded(recorder, probed)
        with recorder, noted(recorder.record, config.device):
            probed.prepare()
            categorize_parts(recorder, model)
            num_events_before_steps = len(recorder.record.events)
            watch_step(recorder, probed, optimizer)
            run_updates(recorder, probed, 2)
            with known_length():
                probed.end_run(recorder.enter_phase)
    categorize(recorder.record, model)
    return split_by_place(recorder, num_events_before_steps)


def number_parameters(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data_ptr = partial(int, id(parameter))


def stand_in(recorder: PlacedRecorder) -> None:
    """Let FSDP2 see the recorder's device, and the recorder what is no operator."""
    streams = {torch.cpu.current_stream(): 0}
    torch.cpu.stream = lambda stream: recorder.on_stream(streams.setdefault(stream, len(streams)))
    wrapper._get_device_from_mesh = lambda mesh: recorder.device
    allocate, find_shape = collectives.DefaultAllocMixin.allocate, ShardingPropagator._propagate_tensor_meta_non_cached

    def allocate_buffer(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with recorder.of_category("communication"):
            return allocate(self, *args, **kwargs)

    def find_shape_aside(self: ShardingPropagator, schema: OpSchema) -> Any:
        with _disable_current_modes():
            return find_shape(self, schema)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        recorder.note_pinned(pinned)
        return pinned

    def recorded(function: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def run(gathered: torch.Tensor) -> None:
            function(gathered)
            with recorder.of_category("weights"):
                recorder.allocated(gathered, function.__name__)

        return run

    ShardingPropagator._propagate_tensor_meta_non_cached = find_shape_aside
    torch.Tensor.pin_memory = pin
    collectives.DefaultAllocMixin.allocate = allocate_buffer
    parameters.alloc_storage = recorded(parameters.alloc_storage)
    parameters.free_storage = recorded(parameters.free_storage)


def categorize_parts(recorder: PlacedRecorder, model: nn.Module) -> None:
    """The parts of the weights, which have just been split."""
    for name, parameter in model.named_parameters():
        part = recorder.find(parameter)
        part.module, part.category = name, "trained" if parameter.requires_grad else "weights"
