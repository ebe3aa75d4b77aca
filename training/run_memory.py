"""A run's memory, predicted beside measured: in TensorBoard, in run.json and in one line at the end.

Both figures are the bytes of all tensors at the peak of training. A GPU's allocator counts them, over all steps. A
CPU's does not: there PyTorch's profiler watches one micro-batch, the last of the second update, which finds optimizer
state and accumulated gradients in place. The prediction is for the largest batch that the data can bring: rows as long
as the longest, with as many images as any, every text position labelled. The micro-batch that a CPU measures may be
smaller.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.profiler import profile
from torch.utils.tensorboard import SummaryWriter

from data.worst_case import Row
from memory.categories import RESIDENT
from memory.cpu_profile import bytes_in_use, memory_events, profile_memory, rise, storage_bytes
from training.forecast import Forecast
from utils import GIB, UserError


# TensorBoard's tags and memory_probe.py's keys. `host_bytes` counts all processes on one computer, with data workers.
FIGURES = {"peak_allocated_bytes": "peak_allocated_bytes", "host_bytes": "host_bytes"}
GPU_FIGURES = {"reserved_bytes": "peak_reserved_bytes", "device_bytes": "device_bytes"}


class RunMemory:
    """Measures memory, and logs the forecast beside it as soon as it is done. For the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        step_flags: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        longest_row: Row,
        writer: SummaryWriter,
        forecast: bool = True,
    ) -> None:
        """`forecast`: whether to start the process that predicts."""
        self.accelerator, self.model, self.writer = accelerator, model, writer
        self.longest_row, self.rows = longest_row, step_flags["per_device_train_batch_size"]
        self.predicted: dict[str, int] = {}
        self.forecast: Forecast | None = None
        self.problem = None if forecast else "--forecast false"
        try:
            if forecast:  # of training alone, which is what is measured: no evaluation
                self.forecast = Forecast(step_flags | {"eval_samples": 0}, accelerator, longest_row)
        except (UserError, OSError) as error:  # /tmp is full, or too many processes: the run goes on without it
            self.problem = str(error)
        # DeepSpeed's engine keeps masters, partitions and buffers where these hooks do not see them.
        is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.measured = {} if is_deepspeed else watch_state(model, optimizer.optimizer)
        self.num_micro_batches = 0
        self.profiler: profile | None = None
        self.in_use_bytes = 0
        self.measured_shape: tuple[int, int] | None = None  # rows and tokens, on a CPU
        if not torch.cuda.is_available():
            self.handle = model.register_forward_pre_hook(self._before_forward)
        self.writer.add_custom_scalars(layout())

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
        if self.profiler is not None:
            self.profiler.stop()
            # A data worker's tensors are in shared memory, which bytes_in_use does not count.
            from_worker_bytes = storage_bytes(tensor for tensor in batch.values() if tensor.is_shared())
            step_bytes = rise(memory_events(self.profiler))
            self.measured["peak_allocated_bytes"] = self.in_use_bytes + from_worker_bytes + step_bytes
            self.measured_shape = tuple(batch["input_ids"].shape)
            self.profiler = None

    def log(self, global_step: int) -> None:
        """Log what is measured, and the forecast once it is done: a line from step 0 on."""
        is_new = self._take_forecast()
        lines = {f"memory/{name}": nbytes for name, nbytes in self.measured.items()}
        predicted = {f"memory/predicted_{name}": nbytes for name, nbytes in self.predicted.items()}
        for tag, nbytes in predicted.items() if is_new else ():
            self.writer.add_scalar(tag, nbytes, 0)
        for tag, nbytes in (lines | predicted).items():
            self.writer.add_scalar(tag, nbytes, global_step)

    def _take_forecast(self) -> bool:
        """Read the forecast if it is done. Returns whether it is new."""
        if self.predicted or self.forecast is None or (result := self.forecast.poll()) is None:
            return False
        self.predicted = {f"{name}_bytes": nbytes for name, nbytes in result["breakdown"].items() if nbytes}
        figures = FIGURES | (GPU_FIGURES if torch.cuda.is_available() else {})
        self.predicted |= {tag: result[key] for tag, key in figures.items()}
        return True

    def finish(self, gpu_peak_bytes: int) -> dict[str, Any]:
        """Print the comparison; returns it for run.json. `gpu_peak_bytes` is the peak of training on a GPU."""
        self.stop()
        self._take_forecast()
        if torch.cuda.is_available():
            self.measured["peak_allocated_bytes"] = gpu_peak_bytes
        predicted_bytes = self.predicted.get("peak_allocated_bytes")
        measured_bytes = self.measured.get("peak_allocated_bytes")
        words = [
            f"predicted {gib(predicted_bytes)}" if predicted_bytes else f"no prediction ({self.problem})",
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
            words[1] += " (on a CPU that is done in the second update)"
        print(f"Memory of tensors at the peak: {', '.join(words)}", flush=True)
        return {
            "predicted_peak_allocated_bytes": predicted_bytes,
            "measured_peak_allocated_bytes": measured_bytes,
            "error": error,
            "predicted_batch": {"rows": self.rows, **vars(self.longest_row)},
            "predicted": self.predicted,
            "measured": self.measured,
            "problem": self.problem,
        }

    def stop(self) -> None:
        """End the profiler and the forecast."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
        if self.forecast is not None:
            self.forecast.stop()
            self.problem = self.forecast.problem


def watch_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state. The dict is filled in the first update."""
    measured: dict[str, int] = {}

    def before_step(*_: object) -> None:
        measured["gradients_bytes"] = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
        handles[0].remove()

    def after_step(*_: object) -> None:
        parameters = list(model.parameters())
        values = [value for state in optimizer.state.values() for value in state.values()]
        measured["weights_bytes"] = storage_bytes([*(p for p in parameters if not p.requires_grad), *model.buffers()])
        measured["trained_bytes"] = storage_bytes(p for p in parameters if p.requires_grad)
        measured["optimizer_bytes"] = storage_bytes(value for value in values if isinstance(value, torch.Tensor))
        handles[1].remove()

    handles = [optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step)]
    return measured


def layout() -> dict[str, dict[str, list]]:
    """For TensorBoard's tab of custom scalars: a chart for each figure, with the measured and the predicted line."""
    names = ["peak_allocated_bytes", *(["reserved_bytes"] if torch.cuda.is_available() else [])]
    names += [f"{category}_bytes" for category in RESIDENT]
    return {"memory": {name: ["Multiline", [f"memory/{name}", f"memory/predicted_{name}"]] for name in names}}


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.3f} GiB"
