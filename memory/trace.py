"""Predicts the peak memory of training from the code that trains, without weights and without a GPU.

    trace = trace_training(StepConfig(model="mgm-2b", mixed_precision="bf16"), device_type="cuda")
    trace.peak_bytes, trace.breakdown(), trace.phase_peaks(), trace.largest_tensors()

The model is built by step.build_model on `meta` and then made of fake tensors, which have shapes and lifetimes but no
data; step.training_step runs on them, and a Recorder (memory/record.py) notes what is allocated and released. Where
CUDA's kernels allocate otherwise than the CPU's stands in memory/kernels.py.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from accelerate import Accelerator
from peft.tuners.lora import dora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationMixin, masking_utils

import step
from data.worst_case import worst_case_batch
from layers.quantization import dequantize, replace_tensors, state_tensors
from memory.kernels import BLOCK_BYTES, WORKSPACES, kernels_of, use_foreach
from memory.record import PHASES, Allocation, Record, Recorder
from memory.updates import end_run, probe_accelerator, run_updates, watch_phases
from models.lora import trained_parameters


CATEGORIES = (
    "weights", "trained", "gradients", "optimizer", "batch", "activations", "loss", "vision", "temporaries",
    "communication",
)  # fmt: skip
LANGUAGE_MODULE = "language_model"


@dataclass
class Trace:
    """The record of a steady-state window of training, and what can be said about it. All figures are bytes."""

    record: Record

    def timeline(self) -> list[int]:
        """Bytes in use after each event."""
        total, totals = 0, []
        for nbytes, _ in self.record.events:
            total += nbytes
            totals.append(total)
        return totals

    @property
    def peak_bytes(self) -> int:
        return max(self.timeline())

    @property
    def peak_index(self) -> int:
        """The event with which the peak is reached."""
        timeline = self.timeline()
        return timeline.index(max(timeline))

    def alive_at(self, index: int) -> list[Allocation]:
        """What is in use after event `index`, in order of allocation."""
        started = [allocation for nbytes, allocation in self.record.events[: index + 1] if nbytes >= 0]
        return [allocation for allocation in started if allocation.end is None or allocation.end > index]

    def breakdown(self) -> dict[str, int]:
        """The bytes of each category at the peak; they add up to `peak_bytes`."""
        sums = Counter({category: 0 for category in CATEGORIES})
        for allocation in self.alive_at(self.peak_index):
            sums[allocation.category] += allocation.nbytes
        return dict(sums)

    def phase_peaks(self) -> dict[str, int]:
        """The most that was in use during each phase."""
        peaks = dict.fromkeys(PHASES, 0)
        starts = [*self.record.phase_starts, (len(self.record.events), "")]
        timeline = self.timeline()
        for (start, phase), (end, _) in zip(starts, starts[1:], strict=False):
            in_use = timeline[max(start - 1, 0) : end]
            peaks[phase] = max([peaks[phase], *in_use])
        return peaks

    def largest_tensors(self, count: int = 10) -> list[dict[str, object]]:
        """The largest tensors alive at the peak, largest first."""
        alive = sorted(self.alive_at(self.peak_index), key=lambda allocation: -allocation.nbytes)
        keys = ("nbytes", "shape", "dtype", "category", "module", "op")
        return [{key: getattr(allocation, key) for key in keys} for allocation in alive[:count]]


def trace_training(
    config: step.StepConfig, device_type: str = "cuda", images_per_sample: int = 1, cublas_workspace_bytes: int = 0
) -> Trace:
    """Trace the updates of a training run in its steady state on the worst case of a batch.

    Args:
        config: the flags of a step.
        device_type: what is predicted, `cuda` or `cpu`.
        images_per_sample: of each row of the batch.
        cublas_workspace_bytes: of each of two handles, that of the thread that runs forward and autograd's.

    Raises:
        TraceError: the step does something whose memory depends on data.
        ValueError: the images take more positions than a row has.
    """
    config = copy.copy(config)
    if config.mixed_precision == "fp16":
        config.mixed_precision = "bf16"  # the CPU has no fp16 autocast; either takes two bytes
    fake_mode = FakeTensorMode()
    with probe_accelerator(config) as accelerator:
        model = build_fake_model(config, fake_mode)
        recorder = Recorder(model, WORKSPACES[device_type], BLOCK_BYTES[device_type])
        with fake_mode, kernels_of(device_type), random_states(recorder, device_type):
            batch = worst_case_batch(model.config, config, images_per_sample)
            adopt(recorder, model, batch, cublas_workspace_bytes)
            optimizer = step.build_optimizer(model, config.optim, learning_rate=1e-3)
            if device_type == "cuda":
                use_foreach(optimizer)
            PhaseHooks(recorder, accelerator, model, optimizer)
            with recorder, known_quantization():
                # The model is where it belongs: fake parameters refuse to be moved.
                wrapped, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, True])
                with nullcontext() if config.packing else known_mask():  # a packed row needs a mask
                    run_updates(accelerator, wrapped, optimizer, batch, config)
                with known_mask(), known_length():
                    end_run(
                        accelerator,
                        wrapped,
                        config,
                        images_per_sample,
                        device="cpu",
                        enter_phase=recorder.enter_phase,
                        has_host=device_type == "cpu",
                    )
    categorize(recorder.record, model)
    return Trace(recorder.record)


def adopt(recorder: Recorder, model: nn.Module, batch: dict[str, torch.Tensor], cublas_workspace_bytes: int) -> None:
    """Record what is there before the first step."""
    recorder.enter_phase("load")
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *state_tensors(model)]:
        allocation = recorder.allocated(tensor, "load")
        allocation.module = name
        allocation.category = "trained" if tensor.requires_grad else "weights"
    for name, tensor in batch.items():
        allocation = recorder.allocated(tensor, "load")
        allocation.module, allocation.category = name, "batch"
    for thread in ("forward", "backward") if cublas_workspace_bytes else ():
        recorder.reserve(cublas_workspace_bytes, f"cuBLAS, {thread}")


def build_fake_model(
    config: step.StepConfig, fake_mode: FakeTensorMode, device: str = "cpu", is_deepspeed: bool = False
) -> nn.Module:
    """step.build_model's model, in training mode, of fake tensors on the device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = step.build_model(config, is_deepspeed)
    return fake_model(model, device, fake_mode).train()


def fake_model(model: nn.Module, device: str, fake_mode: FakeTensorMode) -> nn.Module:
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
        return fake
    parameter = nn.Parameter(fake, tensor.requires_grad)
    if (state := getattr(tensor, "quant_state", None)) is not None:
        parameter.quant_state = replace_tensors(state, lambda tensor: _fake(tensor, device))
    return parameter


@contextmanager
def known_mask() -> Iterator[None]:
    """transformers makes no attention mask for a batch without padding. It looks for padding in the data, which fake
    tensors lack, so it is told what the worst case has: a single row is never padded, several are."""
    with (
        patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
        patch.object(masking_utils, "fast_all", lambda mask: len(mask) == 1),
    ):
        yield


@contextmanager
def known_length() -> Iterator[None]:
    """generate asks after each token whether all answers have ended, which fake tensors cannot tell: they have after
    the two of answer_worst_case."""
    num_tokens = itertools.count()
    with patch.object(GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: next(num_tokens) < 2):
        yield


@contextmanager
def known_quantization() -> Iterator[None]:
    """DoRA asks for whole weights, and PEFT tells a quantized one by its class, which fake tensors lack."""

    def weight_of(layer: nn.Module) -> torch.Tensor:
        state = getattr(layer.weight, "quant_state", None)
        return layer.weight if state is None else dequantize(layer.weight, state)

    with patch.object(dora, "dequantize_module_weight", weight_of):
        yield


class PhaseHooks:
    """Tells a recorder where training_step is, and which storages turn out to be gradients and optimizer state."""

    def __init__(
        self, recorder: Recorder, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ):
        self.recorder, self.optimizer = recorder, optimizer
        watch_phases(accelerator, model, recorder.enter_phase)
        for parameter in trained_parameters(model):
            parameter.register_post_accumulate_grad_hook(self._mark_gradient)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _mark_gradient(self, parameter: torch.Tensor) -> None:
        self.recorder.find(parameter.grad).category = "gradients"

    def _before_step(self, *_: object) -> None:
        self.recorder.counters_are_known = True

    def _after_step(self, *_: object) -> None:
        self.recorder.counters_are_known = False
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and (allocation := self.recorder.find(value)):
                    allocation.category = "optimizer"


@contextmanager
def random_states(recorder: Recorder, device_type: str) -> Iterator[None]:
    """Checkpointing keeps the random state of each region, made where a dispatch mode does not see it. It is in the
    host's memory; a GPU's peak does not have it."""
    get_rng_state = torch.get_rng_state

    def get_and_record() -> torch.Tensor:
        state = get_rng_state()
        recorder.allocated(state, "get_rng_state")
        return state

    with patch.object(torch, "get_rng_state", get_and_record) if device_type == "cpu" else nullcontext():
        yield


def categorize(record: Record, model: nn.Module) -> None:
    """Give each allocation without a category the one that its module and its life tell."""
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == LANGUAGE_MODULE]
    joint = paths[0].rpartition(".")[0] if paths else None
    for nbytes, allocation in record.events:
        if nbytes >= 0 and allocation.category is None:
            allocation.category = _category(allocation, joint)


def _category(allocation: Allocation, joint: str | None) -> str:
    """`joint` is the path of the module that holds the language model and what feeds it; the head is beside it."""
    if allocation.phase in ("load", "step"):
        return "temporaries"
    if LANGUAGE_MODULE in allocation.module.split("."):
        return "activations" if allocation.saved_for_backward else "temporaries"
    if joint is None and ".layers." in f".{allocation.module}.":  # of a language model without a vision side
        return "activations" if allocation.saved_for_backward else "temporaries"
    in_joint = joint is not None and f"{allocation.module}.".startswith(f"{joint}.")
    return "vision" if in_joint else "loss"
