"""A run's memory as it goes on: predicted beside measured, in TensorBoard, in run.json and in one line at the end.

What is compared is the same quantity on both sides. On a GPU: the bytes that tensors hold at the peak of a step, as
the allocator counts them. On a CPU, which keeps no such count: the main process's resident memory at its peak while it
trains, and for the prediction what was resident when training began plus what the steps add to it. The batch that is
predicted has the longest row of the data and the most images in every row, every text position labelled.
"""

import resource
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from data.batching import column_values
from memory_forecast import Forecast, Row
from memory_gpus import GIB
from utils import UserError


MEASURED_CATEGORIES = ("weights", "trained", "gradients", "optimizer")  # of a breakdown: what can be looked up
GPU_FIGURES = {"peak_allocated_bytes": "peak_allocated_bytes", "reserved_bytes": "peak_reserved_bytes"}


class RunMemory:
    """Measures, and shows the forecast beside it as soon as it is there. For the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        step_flags: dict[str, Any],
        longest_row: Row,
        writer: SummaryWriter,
    ) -> None:
        self.accelerator = accelerator
        self.writer = writer
        self.longest_row = longest_row
        self.resident_at_start_bytes = 0
        self.measured: dict[str, int] = {}
        self.predicted: dict[str, int] = {}
        self.forecast: Forecast | None = None
        self.problem: str | None = None
        try:
            self.forecast = Forecast(step_flags, accelerator, longest_row)
        except (UserError, OSError) as error:  # a full /tmp, no more processes: the run does not need it
            self.problem = str(error)
        writer.add_custom_scalars(layout())

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Training begins: what is resident now, and from the first step on what its tensors take."""
        self.resident_at_start_bytes = psutil.Process().memory_info().rss
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # there the engine has masters of its own
            inner = optimizer.optimizer
            handles = [
                inner.register_step_pre_hook(lambda *_: self._measure_gradients(model, handles)),
                inner.register_step_post_hook(lambda *_: self._measure_state(model, inner, handles)),
            ]

    def _measure_gradients(self, model: nn.Module, handles: list[torch.utils.hooks.RemovableHandle]) -> None:
        self.measured["gradients"] = num_bytes(p.grad for p in model.parameters() if p.grad is not None)
        handles[0].remove()

    def _measure_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, handles: list[torch.utils.hooks.RemovableHandle]
    ) -> None:
        parameters = list(model.parameters())
        frozen = [*(p for p in parameters if not p.requires_grad), *model.buffers()]
        values = [value for state in optimizer.state.values() for value in state.values()]
        self.measured["weights"] = num_bytes(frozen)
        self.measured["trained"] = num_bytes(p for p in parameters if p.requires_grad)
        self.measured["optimizer"] = num_bytes(value for value in values if isinstance(value, torch.Tensor))
        handles[1].remove()

    def scalars(self) -> dict[str, int]:
        """What is measured now, as TensorBoard's `memory/*`; the forecast's lines with it once they are there."""
        self._take_forecast()
        tags = {f"memory/{name}": value for name, value in memory_bytes().items()}
        tags |= {f"memory/{name}_bytes": value for name, value in self.measured.items()}
        return tags | {f"memory/predicted_{name}": value for name, value in self.predicted.items()}

    def _take_forecast(self) -> None:
        if self.predicted or self.forecast is None or (result := self.forecast.poll()) is None:
            return
        self.predicted = {f"{name}_bytes": nbytes for name, nbytes in result["breakdown"].items() if nbytes}
        if torch.cuda.is_available():
            self.predicted |= {name: result[key] for name, key in GPU_FIGURES.items()}
        else:
            added_bytes = result["peak_allocated_bytes"] - result["loaded_bytes"]
            self.predicted["peak_rss_bytes"] = self.resident_at_start_bytes + added_bytes
        for name, nbytes in self.predicted.items():
            self.writer.add_scalar(f"memory/predicted_{name}", nbytes, 0)

    def finish(self, measured_bytes: int) -> dict[str, Any]:
        """The comparison, for run.json, and its line, printed. `measured_bytes` is the peak of training."""
        if self.forecast is not None:
            self.forecast.stop()
            self._take_forecast()
            self.problem = self.forecast.problem
        on_gpu = torch.cuda.is_available()
        result = {
            "what": "allocated on the GPU" if on_gpu else "resident, main process",
            "batch": {"tokens": self.longest_row.num_tokens, "images": self.longest_row.num_images},
            "measured_bytes": measured_bytes,
            "measured": self.measured,
        }
        if not self.predicted:
            print(f"Memory: measured {measured_bytes / GIB:.2f} GiB, no prediction: {self.problem}", flush=True)
            return result | {"problem": self.problem}
        predicted_bytes = self.predicted["peak_allocated_bytes" if on_gpu else "peak_rss_bytes"]
        error = predicted_bytes / measured_bytes - 1
        print(
            f"Memory at the peak ({result['what']}): predicted {predicted_bytes / GIB:.2f} GiB, "
            f"measured {measured_bytes / GIB:.2f} GiB ({error:+.1%})",
            flush=True,
        )
        return result | {"predicted_bytes": predicted_bytes, "error": error, "predicted": self.predicted}

    def stop(self) -> None:
        """The run has ended in some other way."""
        if self.forecast is not None:
            self.forecast.stop()


def longest_row(records: datasets.Dataset, max_seq_len: int, num_image_tokens: int) -> Row:
    """The longest row of the data, with as many images as any record has and the row can hold."""
    num_tokens = min(int(column_values(records, "num_tokens").max()), max_seq_len)
    num_images = pc.max(pc.list_value_length(records.data.column("images"))).as_py() or 0
    return Row(num_tokens, min(num_images, num_tokens // num_image_tokens))


def layout() -> dict[str, dict[str, list]]:
    """TensorBoard's tab of custom scalars: each measured line and its predicted one in a chart."""
    pairs = ["peak_allocated_bytes", "reserved_bytes"] if torch.cuda.is_available() else ["peak_rss_bytes"]
    pairs += [f"{category}_bytes" for category in MEASURED_CATEGORIES]
    return {"memory": {name: ["Multiline", [f"memory/{name}", f"memory/predicted_{name}"]] for name in pairs}}


def num_bytes(tensors: Any) -> int:
    """Bytes of the tensors' storages, shared ones once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def memory_bytes() -> dict[str, int]:
    """On a GPU what PyTorch holds there; always the process's resident memory, on a CPU with its peak."""
    rss = {"rss_bytes": psutil.Process().memory_info().rss}
    if not torch.cuda.is_available():
        return rss | {"peak_rss_bytes": peak_bytes()}
    gpu = {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
    }
    return gpu | rss


def reset_peak() -> None:
    """The peak is that of what comes from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak of resident memory
    except OSError:
        pass  # not allowed, or no Linux: the peak is then that of the process's whole life


def peak_bytes() -> int:
    """The most memory since the last reset on a GPU; on a CPU the most resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
