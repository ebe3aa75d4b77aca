"""Predict the peak memory of training from the code that trains, without weights and without a GPU.

    record = trace_single(ProbeConfig(model="mgm-2b", mode="predict"))
    record.peak_bytes, record.breakdown(), record.phase_peaks(), record.largest_at_peak()

step.build_model builds the model on `meta`. Fake tensors then take the place of its own: they have shapes and
lifetimes but no data. step.training_step runs on them, and a Recorder (memory/recorder.py) notes what is allocated and
freed. memory/kernels.py has what CUDA's kernels allocate otherwise than the CPU's.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import nn

import step
from layers.quantization import replace_tensors, state_tensors
from memory.config import ProbeConfig
from memory.kernels import BLOCK_BYTES, kernels_of, use_foreach, use_fused, workspaces_of
from memory.known import known_length, known_quantization
from memory.notes import noted
from memory.partly_fake import PartlyFakeMode
from memory.probed_step import ProbedStep, local_accelerator, worst_case_inputs
from memory.record import Allocation, Record
from memory.recorder import Recorder
from models.lora import trained_parameters
from models.parts import language_model, path_of


def trace_single(config: ProbeConfig) -> Record:
    """Trace the updates of one process in their steady state, on the largest batch that can come.

    Raises:
        TraceError: the step does something whose memory depends on data.
        UserError: the images need more positions than a row has.
    """
    on_gpu = config.device == "cuda"
    inputs = worst_case_inputs(config)  # real
    config, has_scaler = copy.copy(config), config.mixed_precision == "fp16"
    if has_scaler:
        config.mixed_precision = "bf16"  # the CPU has no fp16 autocast; either takes two bytes
    fake_mode = PartlyFakeMode()
    with local_accelerator(config) as accelerator:
        model = build_fake_model(config, fake_mode)
        recorder = Recorder(model, workspaces_of(config.device, config.gpu), BLOCK_BYTES[config.device])
        with fake_mode, kernels_of(config.device), random_states(recorder, config.device):
            probed = ProbedStep.build(config, accelerator, model, inputs=inputs)
            record_loaded(recorder, probed)
            if on_gpu:
                (use_foreach if has_scaler else use_fused)(probed.optimizer)
            watch_step(recorder, probed, probed.optimizer)
            with recorder, noted(recorder.record, config.device), known_quantization():
                # The model is where it belongs: fake parameters refuse to be moved.
                probed.prepare(device_placement=[False, True])
                run_updates(recorder, probed, 2)
                with known_length():
                    probed.end_run(recorder.enter_phase, copies_to_host=not on_gpu)
    categorize(recorder.record, model)
    recorder.record.work = recorder.work.micro_batches
    return recorder.record


def run_updates(recorder: Recorder, probed: ProbedStep, num_updates: int) -> None:
    """Run them, and for a GPU note what the last one asks of it."""
    probed.run_updates(num_updates - 1)
    if probed.config.device == "cuda":
        recorder.work.start()
    probed.run_updates(1)
    recorder.work.stop()


def record_loaded(recorder: Recorder, probed: ProbedStep) -> None:
    """Record what exists before the first step: weights, batch, cuBLAS's workspaces."""
    recorder.enter_phase("load")
    model, workspace_bytes = probed.model, probed.config.cublas_workspace_bytes
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *state_tensors(model)]:
        allocation = recorder.allocated(tensor, "load")
        allocation.module = name
        allocation.category = "trained" if tensor.requires_grad else "weights"
    for name, tensor in probed.batch.items():
        allocation = recorder.allocated(tensor, "load")
        allocation.module, allocation.category = name, "batch"
    for thread in ("forward", "backward") if workspace_bytes else ():
        recorder.reserve(workspace_bytes, f"cuBLAS, {thread}")


def build_fake_model(
    config: ProbeConfig,
    fake_mode: PartlyFakeMode,
    device: str = "cpu",
    is_deepspeed: bool = False,
    is_fsdp: bool = False,
) -> nn.Module:
    """step.build_model's model, of fake tensors on the device."""
    return fake_model(build_meta_model(config, is_deepspeed, is_fsdp), device, fake_mode)


def build_meta_model(config: ProbeConfig, is_deepspeed: bool = False, is_fsdp: bool = False) -> nn.Module:
    """step.build_model's model, on `meta`."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return step.build_model(config, is_deepspeed, is_fsdp)


def trained_shapes(config: ProbeConfig) -> dict[str, torch.Size]:
    """The unsharded shape of each parameter that is trained, by name: the same under every strategy."""
    return {name: p.shape for name, p in build_meta_model(config).named_parameters() if p.requires_grad}


def fake_model(model: nn.Module, device: str, fake_mode: PartlyFakeMode) -> nn.Module:
    """The model, its tensors (on `meta`) replaced by fake ones on the device. What modules share stays shared."""
    replaced: dict[torch.Tensor, torch.Tensor] = {}
    with fake_mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if tensor not in replaced:
                            replaced[tensor] = _fake(tensor, device)
                        tensors[name] = replaced[tensor]
    return model


def _fake(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Must run under a FakeTensorMode."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not isinstance(tensor, nn.Parameter):
        # What a model knows by number is real (memory/partly_fake.py): as an index, 0 is always right.
        return fake if tensor.is_floating_point() else fake.zero_()
    parameter = nn.Parameter(fake, tensor.requires_grad)
    if (state := getattr(tensor, "quant_state", None)) is not None:
        parameter.quant_state = replace_tensors(state, lambda tensor: _fake(tensor, device))
    return parameter


def watch_step(recorder: Recorder, probed: ProbedStep, optimizer: torch.optim.Optimizer) -> None:
    """Tell the recorder which phase the step is in, and which storages are gradients and optimizer state.

    `optimizer` is torch's own: `prepare` wraps it.
    """

    def mark_gradient(parameter: torch.Tensor) -> None:
        recorder.find(parameter.grad).category = "gradients"

    def before_step(*_: object) -> None:
        recorder.answers_items = True
        recorder.work.wait()  # train.py reads the gradients' norm
        recorder.work.begin_optimizer()

    def after_step(*_: object) -> None:
        recorder.answers_items = False
        recorder.work.end_optimizer()
        recorder.mark_state(optimizer)

    probed.watch_phases(recorder.enter_phase)
    for parameter in trained_parameters(probed.model):
        parameter.register_post_accumulate_grad_hook(mark_gradient)
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


@contextmanager
def random_states(recorder: Recorder, device_type: str) -> Iterator[None]:
    """Checkpointing keeps the random state of each region. No dispatch mode sees it, so it is recorded here.

    It is in host memory: a GPU's peak does not include it.
    """
    get_rng_state = torch.get_rng_state

    def get_and_record() -> torch.Tensor:
        state = get_rng_state()
        recorder.allocated(state, "get_rng_state")
        return state

    with patch.object(torch, "get_rng_state", get_and_record) if device_type == "cpu" else nullcontext():
        yield


def categorize(record: Record, model: nn.Module) -> None:
    """Give each allocation without a category the one that follows from its module and its lifetime."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    language, joint = path_of(model, language_model(base)), path_of(model, base.base_model)
    if language == joint:  # a model that reads text alone
        joint = None
    for nbytes, allocation in record.events:
        if nbytes >= 0 and allocation.category is None:
            allocation.category = _category(allocation, language, joint)


def _category(allocation: Allocation, language: str, joint: str | None) -> str:
    """`language` is the path of the language model, `joint` that of the module that holds it and what feeds it; the
    head is beside them."""
    if allocation.phase in ("load", "step", "save"):
        return "temporaries"
    if _is_in(allocation.module, language):
        return "activations" if allocation.saved_for_backward else "temporaries"
    return "vision" if joint is not None and _is_in(allocation.module, joint) else "loss"


def _is_in(path: str, parent: str) -> bool:
    return f"{path}.".startswith(f"{parent}.")
