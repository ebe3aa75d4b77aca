"""A run's memory, predicted beside measured.

Both figures are the bytes of all tensors at the peak of training. A GPU's allocator counts them, over all steps. A
CPU's does not: there PyTorch's profiler watches one micro-batch, the last of the second update, which finds optimizer
state and accumulated gradients in place.
"""

import math
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.profiler import profile

from data.worst_case import Row
from memory.categories import RESIDENT
from memory.cpu_profile import bytes_in_use, memory_events, profile_memory, rise, storage_bytes
from memory.margin import MEMORY_MARGIN
from models.fsdp2 import own_part
from utils import GIB


# TensorBoard's tags and memory_probe.py's keys. `host_bytes` counts all processes on one computer, with data workers.
FIGURES = {"peak_allocated_bytes": "peak_allocated_bytes", "host_bytes": "host_bytes"}
GPU_FIGURES = {"reserved_bytes": "peak_reserved_bytes", "device_bytes": "device_bytes"}


class RunMemory:
    """Measures memory. For the main process. The predicted batch has `rows` of the `longest_row`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rows: int,
        longest_row: Row,
    ) -> None:
        self.accelerator, self.model = accelerator, model
        self.rows, self.longest_row = rows, longest_row
        self.predicted: dict[str, int] = {}
        # DeepSpeed's engine keeps masters, partitions and buffers where these hooks do not see them.
        is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.measured = {} if is_deepspeed else watch_state(model, optimizer.optimizer)
        self.num_micro_batches = 0
        self.profiler: profile | None = None
        self.in_use_bytes = 0
        self.measured_shape: tuple[int, int] | None = None  # rows and tokens of the micro-batch, on a GPU the largest
        # The profiler's bytes begin with what is in use, which is not known of FSDP2's split tensors.
        if not torch.cuda.is_available() and not accelerator.is_fsdp2:
            self.handle = model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, *_: object) -> None:
        """On a CPU the last micro-batch of the second update is profiled from here on."""
        if self.model.training and self.num_micro_batches == 2 * self.accelerator.gradient_accumulation_steps - 1:
            self.handle.remove()
            self.in_use_bytes = bytes_in_use(self.model)
            self.profiler = profile_memory()
            self.profiler.start()

    def micro_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """After each micro-batch's step."""
        self.num_micro_batches += 1
        shape = tuple(batch["input_ids"].shape)
        if torch.cuda.is_available():
            self.measured_shape = max(self.measured_shape or shape, shape, key=math.prod)
        if self.profiler is not None:
            self.profiler.stop()
            # A data worker's tensors are in shared memory, which bytes_in_use does not count.
            from_worker_bytes = storage_bytes(tensor for tensor in batch.values() if tensor.is_shared())
            step_bytes = rise(memory_events(self.profiler))
            self.measured["peak_allocated_bytes"] = self.in_use_bytes + from_worker_bytes + step_bytes
            self.measured_shape = shape
            self.profiler = None

    def predict(self, result: dict[str, Any]) -> None:
        """Take what memory_probe.py reports."""
        self.predicted = {f"{name}_bytes": nbytes for name, nbytes in result["breakdown"].items() if nbytes}
        figures = FIGURES | (GPU_FIGURES if torch.cuda.is_available() else {})
        self.predicted |= {tag: result[key] for tag, key in figures.items()}

    def finish(self, gpu_peak_bytes: int, problem: str | None) -> dict[str, Any]:
        """Print the comparison; returns it for run.json.

        Args:
            gpu_peak_bytes: the peak of training on a GPU.
            problem: why there is no forecast.
        """
        if torch.cuda.is_available():
            self.measured["peak_allocated_bytes"] = gpu_peak_bytes
        predicted_bytes = self.predicted.get("peak_allocated_bytes")
        measured_bytes = self.measured.get("peak_allocated_bytes")
        words = [
            f"predicted {gib(predicted_bytes)}" if predicted_bytes else f"no prediction ({problem})",
            f"measured {gib(measured_bytes)}" if measured_bytes else "nothing measured",
        ]
        error = predicted_bytes / measured_bytes - 1 if predicted_bytes and measured_bytes else None
        largest = (self.rows, self.longest_row.num_tokens)
        if error is not None and self.measured_shape not in (None, largest):
            rows, num_tokens = self.measured_shape
            words[1] += f" in a smaller batch ({rows} x {num_tokens} tokens; predicted: {largest[0]} x {largest[1]})"
        elif error is not None:
            words[1] += f" ({error:+.2%})"
        elif measured_bytes is None:
            is_fsdp2 = self.accelerator.is_fsdp2
            reason = "under FSDP2 that needs a GPU" if is_fsdp2 else "on a CPU that is done in the second update"
            words[1] += f" ({reason})"
            problem = problem or f"nothing measured: {reason}"
        print(f"Memory of tensors at the peak: {', '.join(words)}", flush=True)
        # A smaller batch may take less than predicted, but not more.
        is_comparable = error is not None and (error < 0 or self.measured_shape == largest)
        if is_comparable and abs(error) > MEMORY_MARGIN:
            print(warning(predicted_bytes, measured_bytes), file=sys.stderr)
        return {
            "predicted_peak_allocated_bytes": predicted_bytes,
            "measured_peak_allocated_bytes": measured_bytes,
            "error": error,
            "predicted_batch": {"rows": self.rows, **vars(self.longest_row)},
            "predicted": self.predicted,
            "measured": self.measured,
            "problem": problem,
        }

    def stop(self) -> None:
        """End the profiler."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    @property
    def charts(self) -> list[str]:
        """The figures that TensorBoard's tab of custom scalars shows."""
        reserved = ["reserved_bytes"] if torch.cuda.is_available() else []
        return ["peak_allocated_bytes", *reserved, *(f"{category}_bytes" for category in RESIDENT)]


def watch_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process's parameters, gradients and optimizer state. The dict is filled in the first update."""
    measured: dict[str, int] = {}

    def before_step(*_: object) -> None:
        measured["gradients_bytes"] = storage_bytes(own_part(p.grad) for p in model.parameters() if p.grad is not None)
        handles[0].remove()

    def after_step(*_: object) -> None:
        parameters = [(parameter.requires_grad, own_part(parameter)) for parameter in model.parameters()]
        values = [value for state in optimizer.state.values() for value in state.values()]
        measured["weights_bytes"] = storage_bytes(
            [*(p for is_trained, p in parameters if not is_trained), *model.buffers()]
        )
        measured["trained_bytes"] = storage_bytes(p for is_trained, p in parameters if is_trained)
        measured["optimizer_bytes"] = storage_bytes(own_part(x) for x in values if isinstance(x, torch.Tensor))
        handles[1].remove()

    handles = [optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step)]
    return measured


def warning(predicted_bytes: int, measured_bytes: int) -> str:
    """What to look at when memory differs by more than the margin."""
    difference = f"warning: tensors took {gib(measured_bytes)} at the peak, predicted were {gib(predicted_bytes)}: "
    if measured_bytes > predicted_bytes:
        return difference + "leave room for the difference; docs/memory.md says how near a prediction comes"
    return difference + "look whether the largest batches have fewer images or labels than the predicted one"


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.3f} GiB"
