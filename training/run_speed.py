"""The seconds of a run's updates, predicted beside measured.

An update is measured from the end of the one before to its own end, where the host has waited for the gradients' norm.
So it has all that a run waits for, while the prediction has the step alone: neither data that comes too late nor
checkpoints. The first updates do not count, also after a resume: they are slower.
"""

import sys
import time
from collections import deque
from statistics import median
from typing import Any

import torch

from memory.margin import TIME_MARGIN
from memory.measure_time import WARM_UP_UPDATES


AS_LARGE = 0.9  # the share of the predicted update's tokens from which on an update is compared with it
NUM_LATEST = 10  # updates behind a point in TensorBoard


class RunSpeed:
    """Measures the seconds of updates. For the main process.

    Args:
        num_tokens: of the predicted update on one device: positions, padding counted.
        on_gpu: whether the run is on a GPU. For a CPU no time is predicted.
        num_processes: of the run. TIME_MARGIN is that of one: no network among several is predicted.
    """

    charts = ("step_seconds",)

    def __init__(self, num_tokens: int, on_gpu: bool, num_processes: int = 1) -> None:
        self.num_tokens, self.on_gpu, self.num_processes = num_tokens, on_gpu, num_processes
        self.predicted: dict[str, float] = {}
        self.latest: deque[float] = deque(maxlen=NUM_LATEST)  # seconds of an update each, like the two below
        self.counted: list[float] = []
        self.as_large: list[float] = []
        self.num_updates = self.tokens = self.counted_tokens = 0
        self.since = 0.0

    @property
    def measured(self) -> dict[str, float]:
        """For TensorBoard, of updates of all sizes."""
        return {"step_seconds": median(self.latest)} if self.latest else {}

    def start(self) -> None:
        """The first update begins."""
        self.since = time.perf_counter()

    def micro_batch(self, batch: dict[str, torch.Tensor]) -> None:
        self.tokens += batch["input_ids"].numel()

    def update(self) -> None:
        """An update has ended."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        tokens, self.tokens = self.tokens, 0
        self.latest.append(seconds)
        self.num_updates += 1
        if self.num_updates > WARM_UP_UPDATES:
            self.counted.append(seconds)
            self.counted_tokens += tokens
            if tokens >= AS_LARGE * self.num_tokens:
                self.as_large.append(seconds)

    def predict(self, result: dict[str, Any]) -> None:
        """Take what memory_probe.py reports."""
        if result["step_seconds"] is not None:
            self.predicted["step_seconds"] = result["step_seconds"]

    def finish(self, problem: str | None) -> dict[str, Any]:
        """Print the comparison; returns it for run.json. `problem`: why there is no forecast."""
        predicted = self.predicted.get("step_seconds")
        measured = median(self.as_large or self.counted) if self.counted else None
        error = predicted / measured - 1 if predicted and self.as_large else None
        if not self.on_gpu:
            problem = "no prediction of time for a CPU"
        elif predicted is not None:
            problem = self._why_not_compared()
        if self.on_gpu:
            print(line(predicted, measured, error, problem), flush=True)
        if error is not None and abs(error) > TIME_MARGIN and self.num_processes == 1:
            print(warning(predicted, measured), file=sys.stderr)
        return {
            "predicted_step_seconds": predicted,
            "measured_step_seconds": measured,
            "error": error,
            "problem": problem,
        }

    def _why_not_compared(self) -> str | None:
        """Why nothing that is measured can be compared with a prediction; None: something can."""
        if self.as_large:
            return None
        if not self.counted:
            return f"the first {WARM_UP_UPDATES} updates do not count"
        mean = self.counted_tokens / len(self.counted)
        return f"in smaller updates: {mean:,.0f} tokens on average, predicted: {self.num_tokens:,}"


def line(predicted: float | None, measured: float | None, error: float | None, problem: str | None) -> str:
    """The comparison in words. `problem`: why there is no prediction, or no error."""
    words = f"measured {measured:.3g}" if measured else "nothing measured"
    if predicted is None:
        return f"Seconds of an update: no prediction ({problem}), {words}"
    remark = problem if error is None else f"{error:+.0%}"
    return f"Seconds of an update: predicted {predicted:.3g}, {words} ({remark})"


def warning(predicted: float, measured: float) -> str:
    """What to look at when time differs by more than the margin."""
    difference = f"warning: an update took {measured:.3g} s, predicted were {predicted:.3g} s: "
    if measured > predicted:
        return difference + (
            "look for data that comes too late (--dataloader_num_workers), many checkpoints (--save_steps) and other "
            "programs on this machine"
        )
    return difference + "this machine is faster than those known; measure it with python memory_probe.py --calibrate"
