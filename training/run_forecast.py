"""A run beside its forecast: memory and time, in TensorBoard, in run.json and in a line each at the end.

The forecast is for the largest batch that the data can bring: rows as long as the longest, with as many images as any,
every text position labelled. A run's batches may be smaller.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from data.worst_case import Row
from training.config import TrainConfig
from training.forecast import Forecast
from training.run_memory import RunMemory
from training.run_speed import RunSpeed
from utils import UserError


class RunForecast:
    """Starts the process that predicts, and logs what it says beside what is measured. For the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        longest_row: Row,
        writer: SummaryWriter,
    ) -> None:
        self.writer = writer
        self.problem = None if config.forecast else "--forecast false"
        self.forecast: Forecast | None = None
        try:
            if config.forecast:  # of training alone, which is what is measured: no evaluation
                self.forecast = Forecast(config.step_flags | {"eval_samples": 0}, accelerator, longest_row)
        except (UserError, OSError) as error:  # /tmp is full, or too many processes: the run goes on without it
            self.problem = str(error)
        rows = config.per_device_train_batch_size
        num_tokens = rows * longest_row.num_tokens * config.gradient_accumulation_steps
        self.memory = RunMemory(accelerator, model, optimizer, rows, longest_row)
        self.speed = RunSpeed(num_tokens, torch.cuda.is_available(), accelerator.num_processes)
        self.parts = {"memory": self.memory, "time": self.speed}  # by the first part of their tags
        self.has_come = False
        charts = {prefix: {name: chart(prefix, name) for name in part.charts} for prefix, part in self.parts.items()}
        writer.add_custom_scalars(charts)  # TensorBoard reads one layout of a run

    def start(self) -> None:
        """The first update begins."""
        self.speed.start()

    def micro_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """After each micro-batch's step. `batch`: forward's arguments."""
        self.memory.micro_batch(batch)
        self.speed.micro_batch(batch)

    def update(self) -> None:
        """After each update, whose norm the host has waited for."""
        self.speed.update()

    def log(self, global_step: int) -> None:
        """Log what is measured, and the forecast once it is done: a line from step 0 on."""
        is_new = self._take()
        for prefix, part in self.parts.items():
            predicted = {f"{prefix}/predicted_{name}": value for name, value in part.predicted.items()}
            measured = {f"{prefix}/{name}": value for name, value in part.measured.items()}
            for tag, value in predicted.items() if is_new else ():
                self.writer.add_scalar(tag, value, 0)
            for tag, value in (measured | predicted).items():
                self.writer.add_scalar(tag, value, global_step)

    def _take(self) -> bool:
        """Read the forecast if it is done. Returns whether it is new."""
        if self.has_come or self.forecast is None or (result := self.forecast.poll()) is None:
            return False
        self.has_come = True
        for part in self.parts.values():
            part.predict(result)
        return True

    def finish(self, gpu_peak_bytes: int) -> dict[str, dict[str, Any]]:
        """Print the comparisons; returns `memory` and `speed` for run.json. `gpu_peak_bytes`: of training on a GPU."""
        self.stop()
        self._take()
        return {"memory": self.memory.finish(gpu_peak_bytes, self.problem), "speed": self.speed.finish(self.problem)}

    def stop(self) -> None:
        """End what watches the run, and the forecast."""
        self.memory.stop()
        if self.forecast is not None:
            self.forecast.stop()
            self.problem = self.forecast.problem


def chart(prefix: str, name: str) -> list:
    """For TensorBoard's tab of custom scalars: the measured line and the predicted one."""
    return ["Multiline", [f"{prefix}/{name}", f"{prefix}/predicted_{name}"]]
