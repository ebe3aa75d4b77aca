"""Trace train.py's step under DeepSpeed, for any number of processes, on one computer without a GPU.

    record = trace_deepspeed(config, Strategy.from_config_file("accelerate_configs/zero3.yaml"))
    record.device.peak_bytes, record.pinned.peak_bytes, record.host.peak_bytes

ZeRO splits optimizer state, gradients and, in stage 3, weights among processes, and can keep them in host memory; what
a layer needs is gathered just before it runs. Nothing here knows what ZeRO gathers, keeps, splits or frees: the
installed DeepSpeed's own engine runs, on the launch config's own values. It runs against three substitutes:

- PyTorch's fake process group: as many processes as wanted, and collectives that return at once;
- a stand-in for DeepSpeed's accelerator, which reports one device;
- fake tensors on two devices, `cpu:0` for the GPU and `cpu` for the host. `.to` copies between them, and an operation
  that mixes them fails, as it would with a GPU and its host.

Not seen: a GPU frees a gathered weight only when the stream that used it has got there (record_stream). So a real peak
can lie above the prediction by what is freed while the stream still works on it. One CPU process allocates what this
says (docs/memory_accuracy.md). Two, with buckets so small that the tiny model's weights are gathered, allocated 0.0 to
6.4 % more in ten measured steps: gloo's threads free what they have sent when they get to it.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from memory.config import ProbeConfig
from memory.kernels import BLOCK_BYTES, kernels_of, use_foreach, workspaces_of
from memory.known import known_length, known_quantization
from memory.launch import in_fresh_process, launched
from memory.notes import noted
from memory.partly_fake import PartlyFakeMode
from memory.placed import PlacedRecord, PlacedRecorder, split_by_place
from memory.probed_step import DEEPSPEED_UPDATES, ProbedStep, launched_accelerator, worst_case_inputs
from memory.record import TraceError
from memory.stand_in import STAND_IN_DEVICE, install_stand_in
from memory.strategy import Strategy
from memory.trace import build_fake_model, categorize, random_states, record_loaded, run_updates


def trace_deepspeed(config: ProbeConfig, strategy: Strategy, rank: int = 0) -> PlacedRecord:
    """Trace the updates of one process in their steady state, on the largest batch that can come, in a fresh process.

    Raises:
        TraceError: the step does something whose memory depends on data.
        ValueError: DeepSpeed refuses the configuration.
        RuntimeError: the step mixes the memories of host and device, as it would fail on a GPU.
    """
    # DeepSpeed's own Adam has the same states as torch's, but has to be compiled.
    deepspeed_config = strategy.deepspeed_config | {"zero_force_ds_cpu_optimizer": False}
    with launched(replace(strategy, deepspeed_config=deepspeed_config)):
        return in_fresh_process(trace_this_process, config, strategy.world_size, rank)


def trace_this_process(config: ProbeConfig, world_size: int, rank: int) -> PlacedRecord:
    """What trace_deepspeed returns. For a fresh process."""
    # ZeRO-2 asserts that its buffers are aligned, and a fake tensor's address is always zero.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    device = STAND_IN_DEVICE[config.device]
    inputs = worst_case_inputs(config)  # real
    fake_mode = PartlyFakeMode(device)
    stand_in = install_stand_in(device, world_size, rank)
    model = build_fake_model(config, fake_mode, device, is_deepspeed=True)
    # The engine moves and casts the whole module, which fake parameters refuse: it is where and what it should be.
    model._apply = lambda fn, recurse=True: model
    recorder = PlacedRecorder(model, device, workspaces_of(config.device, config.gpu), BLOCK_BYTES[config.device])
    fake_mode.in_model = recorder.is_in_model
    stand_in.note_pinned, stand_in.on_stream = recorder.note_pinned, recorder.on_stream
    accelerator = launched_accelerator(config)
    with fake_mode, kernels_of(config.device), random_states(recorder, config.device):
        probed = ProbedStep.build(config, accelerator, model, device, inputs)
        record_loaded(recorder, probed)
        with recorder, noted(recorder.record, config.device), known_quantization():
            prepare(recorder, probed)
            is_split = splits_weights(probed.model)
            if is_split:
                pin_tied(recorder, model)
            num_events_before_steps = len(recorder.record.events)
            run_updates(recorder, probed, DEEPSPEED_UPDATES)
            with known_length():
                probed.end_run(recorder.enter_phase)
    categorize(recorder.record, model)
    return split_by_place(recorder, num_events_before_steps, is_split, splits_on_device=is_split)


def prepare(recorder: PlacedRecorder, probed: ProbedStep) -> None:
    """accelerator.prepare; the recorder is told the engine's phases and what its tensors are for."""
    recorder.answers_items = True
    with recorder.of_category("optimizer"):
        probed.prepare()
    engine = probed.model
    zero, is_stage_3 = engine.optimizer, splits_weights(engine)
    optimizer = private(zero, "optimizer")
    if probed.config.device == "cuda" and not (is_stage_3 and private(zero, "offload_optimizer")):
        use_foreach(optimizer)
    _watch_optimizer(recorder, optimizer)
    _categorize_prepared(recorder, engine)
    _watch_phases(recorder, engine)
    if is_stage_3:
        coordinator = private(zero, "parameter_offload").get_param_coordinator()
        _mark_weights(recorder, coordinator, "fetch_sub_module")
        _mark_weights(recorder, zero, "_post_step")


def splits_weights(engine: nn.Module) -> bool:
    """Whether the engine is ZeRO's stage 3."""
    return engine.zero_optimization_partition_weights()


def private(owner: object, name: str) -> Any:
    """An attribute of DeepSpeed's that is not documented; tests/test_private_apis.py lists each.

    Raises:
        TraceError: this version of DeepSpeed does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        what = f"{type(owner).__name__}.{name}, which a prediction needs"
        raise TraceError(f"DeepSpeed {version('deepspeed')} has no {what}") from None


def pin_tied(recorder: PlacedRecorder, model: nn.Module) -> None:
    """`zero3_init_flag` makes a weight that will be tied like any other: its part is pinned before the model drops it
    for the weight that it is tied to. PyTorch keeps the block: 1 GiB for MGM-2B's head."""
    names = {name for name, _ in model.named_parameters()}  # a tied weight is here under its first name alone
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = private(parameter, "ds_tensor")
        if name not in names and recorder.places.get(recorder.find(part)) == "pinned":
            with recorder.of_category("weights"):
                recorder.note_pinned(part.clone())


def _watch_optimizer(recorder: PlacedRecorder, optimizer: torch.optim.Optimizer) -> None:
    def after_step(*_: object) -> None:
        recorder.mark_state(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        recorder.work.end_optimizer(sum(p.numel() for p in parameters if recorder.in_host_memory(p)))

    optimizer.register_step_pre_hook(lambda *_: recorder.work.begin_optimizer())
    optimizer.register_step_post_hook(after_step)


def _watch_phases(recorder: PlacedRecorder, engine: nn.Module) -> None:
    def in_phase(phase: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            recorder.enter_phase(phase)
            # DeepSpeed reads norms, with offload in the backward pass already; the model's forward has no right to.
            recorder.answers_items = phase != "forward"
            result = function(*args, **kwargs)
            recorder.answers_items = True
            return result

        return run

    engine.forward = in_phase("forward", engine.forward)
    engine.backward = in_phase("backward", engine.backward)
    engine.step = in_phase("step", engine.step)


def _mark_weights(recorder: PlacedRecorder, owner: object, name: str) -> None:
    """All that the owner's function of this name allocates is weights."""
    function = private(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with recorder.of_category("weights"):
            return function(*args, **kwargs)

    setattr(owner, name, run)


def _categorize_prepared(recorder: PlacedRecorder, engine: nn.Module) -> None:
    """The categories of what DeepSpeed has made before the first step: by default it is the optimizer's."""
    zero, is_stage_3 = engine.optimizer, splits_weights(engine)
    for parameter in engine.module.parameters():
        category = "trained" if parameter.requires_grad else "weights"
        recorder.set_category(category, [parameter, private(parameter, "ds_tensor")] if is_stage_3 else [parameter])
    if is_stage_3:
        recorder.set_category("gradients", [private(zero, "grad_partitions_flat_buffer")])
        recorder.set_category("gradients", [master.grad for master in private(zero, "fp32_partitioned_groups_flat")])
    buckets = private(zero, "ipg_buckets").values()
    recorder.set_category("communication", [private(bucket, "buffer") for bucket in buckets])
