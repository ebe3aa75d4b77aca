"""Traces train.py's steps under DeepSpeed, for any number of processes, on one computer without a GPU.

    trace = trace_deepspeed(StepConfig(model="mgm-2b", mixed_precision="bf16"), deepspeed_config, world_size=4)
    trace.device.peak_bytes, trace.pinned.peak_bytes, trace.host.peak_bytes

Nothing here knows what ZeRO gathers, keeps, splits or frees: DeepSpeed's own engine runs, of the installed version and
on the launch config's own values, over fake tensors. What it believes to see is made of three parts:

- PyTorch's fake process group: as many processes as wanted, and collectives that return at once;
- a stand-in for DeepSpeed's accelerator, which says that there is one device;
- fake tensors on two devices, `cpu:0` for the GPU and `cpu` for the host. They are told apart like a GPU and its host:
  `.to` copies from one to the other, and what mixes them fails.

What is not seen: a GPU frees a gathered weight only when the stream that used it has got there (record_stream), so a
real peak can lie above the prediction by what is released while the stream still works on it.
One CPU process allocates what this says (docs/memory_accuracy.md). Two, with buckets so small that the tiny model's
weights are gathered, allocated 0.0 to 6.4 % more in ten measured steps: gloo's threads let go of what they have sent
when they get to it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import step
from child_processes import process_pool
from data.worst_case import with_few_micro_batches, worst_case_batch
from memory.kernels import BLOCK_BYTES, WORKSPACES, kernels_of, use_foreach
from memory.launch import launched
from memory.placed import PlacedRecorder, PlacedTrace, split_by_place
from memory.stand_in import STAND_IN_DEVICE, install_stand_in
from memory.trace import (
    adopt,
    build_fake_model,
    categorize,
    known_length,
    known_mask,
    known_quantization,
    random_states,
)
from memory.updates import accelerator_for, end_run, run_updates
from utils import quiet_libraries


# DeepSpeed records the order of the modules in the first step and fetches ahead from the second one on, so that the
# third is the first one like all others.
NUM_UPDATES = 3


def trace_deepspeed(
    config: step.StepConfig,
    deepspeed_config: dict[str, Any],
    world_size: int = 1,
    device_type: str = "cuda",
    images_per_sample: int = 1,
    cublas_workspace_bytes: int = 0,
) -> PlacedTrace:
    """Trace the updates of rank 0 in their steady state, on the worst case of a batch, in a process of its own.

    Args:
        config: the flags of a step.
        deepspeed_config: what `deepspeed_config_file` holds, "auto" included.
        world_size: processes, each with a device of its own.
        device_type: what is predicted, `cuda` or `cpu`.
        images_per_sample: of each row of the batch.
        cublas_workspace_bytes: as in trace_training.

    Raises:
        TraceError: the step does something whose memory depends on data.
        ValueError: DeepSpeed or the batch refuses the configuration.
        RuntimeError: the step mixes the memories of host and device, as it would fail on a GPU.
    """
    with launched(deepspeed_config, world_size):
        with process_pool() as pool:  # DeepSpeed, accelerate and torch.distributed keep global state
            settings = (world_size, device_type, images_per_sample, cublas_workspace_bytes)
            return pool.submit(_trace, config, *settings).result()


def _trace(config: step.StepConfig, *settings: Any) -> PlacedTrace:
    quiet_libraries()
    with redirect_stdout(sys.stderr):  # DeepSpeed logs there, and a script's last line on stdout is its result
        try:
            return _trace_in_this_process(config, *settings)
        except (ValueError, RuntimeError) as error:  # those of libraries do not survive the way to another process
            plain_type = ValueError if isinstance(error, ValueError) else RuntimeError
            raise plain_type(str(error)) from None


def _trace_in_this_process(
    config: step.StepConfig, world_size: int, device_type: str, images_per_sample: int, cublas_workspace_bytes: int
) -> PlacedTrace:
    config = with_few_micro_batches(config)
    device = STAND_IN_DEVICE[device_type]
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = install_stand_in(device, world_size)
    model = build_fake_model(config, fake_mode, device, is_deepspeed=True)
    # The engine moves and casts the whole module, which fake parameters refuse: it is where and what it should be.
    model._apply = lambda fn, recurse=True: model
    recorder = PlacedRecorder(model, device, WORKSPACES[device_type], BLOCK_BYTES[device_type])
    stand_in.note_pinned, stand_in.on_stream = recorder.note_pinned, recorder.on_stream
    accelerator = accelerator_for(config)
    with fake_mode, kernels_of(device_type), random_states(recorder, device_type):
        batch = worst_case_batch(model.config, config, images_per_sample)
        batch = send_to_device(batch, device)
        adopt(recorder, model, batch, cublas_workspace_bytes)
        optimizer = step.build_optimizer(model, config.optim, learning_rate=1e-3)
        with recorder, known_quantization():
            engine, optimizer = prepare(recorder, accelerator, model, optimizer, device_type)
            page_lock_tied(recorder, model)
            num_events_before_steps = len(recorder.record.events)
            with nullcontext() if config.packing else known_mask():
                run_updates(accelerator, engine, optimizer, batch, config, NUM_UPDATES)
            with known_mask(), known_length(), made_on_their_device():
                end_run(accelerator, engine, config, images_per_sample, device, recorder.enter_phase)
    categorize(recorder.record, model)
    return split_by_place(recorder, num_events_before_steps, is_split=hasattr(engine.optimizer, "parameter_offload"))


@contextmanager
def made_on_their_device() -> Iterator[None]:
    """torch.tensor forgets a fake device's index: what is asked for on `cpu:0` comes on `cpu`, the host. transformers'
    key-value cache begins with such a tensor."""
    make = torch.tensor

    def tensor(*args: Any, device: torch.device | str | None = None, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)

    with patch.object(torch, "tensor", tensor):
        yield


def prepare(
    recorder: PlacedRecorder,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device_type: str,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """accelerator.prepare, with the engine's phases and purposes told to the recorder."""
    recorder.counters_are_known = True
    with _purpose(recorder, "optimizer"):
        engine, optimizer = accelerator.prepare(model, optimizer)
    zero = engine.optimizer
    if device_type == "cuda" and not getattr(zero, "offload_optimizer", False):
        use_foreach(zero.optimizer)
    zero.optimizer.register_step_post_hook(lambda *_: _name_optimizer_state(recorder, zero.optimizer))
    _name_what_stays(recorder, engine)
    _tell_phases(recorder, engine)
    if hasattr(zero, "parameter_offload"):
        _tell_purpose(recorder, zero.parameter_offload.get_param_coordinator(), "fetch_sub_module", "weights")
        _tell_purpose(recorder, zero, "_post_step", "weights")
    return engine, optimizer


def page_lock_tied(recorder: PlacedRecorder, model: nn.Module) -> None:
    """`zero3_init_flag` makes a weight that will be tied like any other: its part is page-locked by the time the model
    gives it up for the one that it is tied to. PyTorch keeps the block, of MGM-2B's head 1 GiB."""
    names = {name for name, _ in model.named_parameters()}  # a tied weight is here under its first name alone
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = getattr(parameter, "ds_tensor", None)
        if name not in names and part is not None and recorder.places.get(recorder.find(part)) == "pinned":
            with _purpose(recorder, "weights"):
                recorder.note_pinned(part.clone())


def _tell_phases(recorder: PlacedRecorder, engine: nn.Module) -> None:
    def told(phase: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            recorder.enter_phase(phase)
            # DeepSpeed reads norms, with offload in the backward pass already; the model's forward has no right to.
            recorder.counters_are_known = phase != "forward"
            result = function(*args, **kwargs)
            recorder.counters_are_known = True
            return result

        return run

    engine.forward = told("forward", engine.forward)
    engine.backward = told("backward", engine.backward)
    engine.step = told("step", engine.step)


@contextmanager
def _purpose(recorder: PlacedRecorder, purpose: str) -> Iterator[None]:
    before, recorder.purpose = recorder.purpose, purpose
    try:
        yield
    finally:
        recorder.purpose = before


def _tell_purpose(recorder: PlacedRecorder, owner: object, name: str, purpose: str) -> None:
    function = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _purpose(recorder, purpose):
            return function(*args, **kwargs)

    setattr(owner, name, run)


def _name_what_stays(recorder: PlacedRecorder, engine: nn.Module) -> None:
    """The categories of what DeepSpeed has made before the first step: by default it is the optimizer's."""
    zero = engine.optimizer
    for parameter in engine.module.parameters():
        category = "trained" if parameter.requires_grad else "weights"
        _name(recorder, category, [parameter, getattr(parameter, "ds_tensor", None)])
    _name(recorder, "gradients", [getattr(zero, "grad_partitions_flat_buffer", None)])
    _name(recorder, "gradients", [master.grad for master in getattr(zero, "fp32_partitioned_groups_flat", [])])
    buckets = getattr(zero, "ipg_buckets", {}).values()
    _name(recorder, "communication", [getattr(bucket, "buffer", None) for bucket in buckets])


def _name_optimizer_state(recorder: PlacedRecorder, optimizer: torch.optim.Optimizer) -> None:
    _name(recorder, "optimizer", [value for state in optimizer.state.values() for value in state.values()])


def _name(recorder: PlacedRecorder, category: str, tensors: list[Any]) -> None:
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and (allocation := recorder.find(tensor)):
            allocation.category = category
