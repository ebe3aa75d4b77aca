"""Explain an out of memory: what was requested, what was predicted, what fills the memory, what would fit."""

import re
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data.worst_case import Row
from memory.report import as_flags, breakdown_lines, title
from training.config import TrainConfig
from training.forecast import Forecast
from utils import UserError, brief_error, size


SNAPSHOT = "oom_snapshot.pickle"  # for https://docs.pytorch.org/memory_viz; never read here
FORECAST_SECONDS = 300


class ExplainOutOfMemory:
    """A context that turns an out-of-memory error into an explanation and a UserError.

    train.py calls `at` whenever something else begins.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, longest: Row) -> None:
        self.accelerator = accelerator
        self.config = config
        self.longest = longest
        self.at("while preparing")

    def __enter__(self) -> "ExplainOutOfMemory":
        return self

    def at(self, when: str, row: Row | None = None) -> None:
        """What begins now, for the message, and the largest row it can have; None: the training data's."""
        self.when, self.row = when, row or self.longest

    def __exit__(self, exception_type: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None or not is_out_of_memory(error):
            return
        asked = asked_for(error)
        write_snapshot(Path(self.config.output_dir))
        if not self.accelerator.is_main_process:
            # The launcher ends all processes when one ends; the main one is about to explain.
            print(f"process {self.accelerator.process_index}: out of memory {self.when}: {asked}", file=sys.stderr)
            threading.Event().wait(FORECAST_SECONDS)
        print(
            f"Out of memory {self.when}. Asking what would fit, this takes a minute ...", file=sys.stderr, flush=True
        )
        diagnosis, problem = self._diagnose()
        if diagnosis is not None:
            print(*diagnosis_lines(diagnosis), sep="\n", file=sys.stderr, flush=True)
        explained = UserError(f"out of memory {self.when}: {asked}. {remedy(diagnosis, problem)}")
        for note in getattr(error, "__notes__", []):
            explained.add_note(note)
        raise explained from None

    def _diagnose(self) -> tuple[dict[str, Any] | None, str | None]:
        """memory_probe.py's report of this run's step, or why there is none."""
        try:
            forecast = Forecast(self.config.step_flags, self.accelerator, self.row, explain=True)
            return forecast.wait(FORECAST_SECONDS), forecast.problem
        except (UserError, OSError) as error:  # there may be no memory for another process either
            return None, brief_error(error)


def is_out_of_memory(error: BaseException) -> bool:
    """The GPU's allocator raises OutOfMemoryError, the CPU's a RuntimeError, Python a MemoryError."""
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return is_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def asked_for(error: BaseException) -> str:
    """What the allocator was asked for, in the words of its message."""
    text = " ".join(str(error).split())
    if match := re.search(r"you tried to allocate (\d+) bytes", text):
        return f"tried to allocate {size(int(match[1]))} of host memory"
    match = re.search(r"Tried to allocate [\d.]+ \w+", text)
    in_use = re.search(r"this process has [\d.]+ \w+ memory in use", text)
    words = [found[0] for found in (match, in_use) if found]
    return ", ".join(words) or text[:200] or type(error).__name__


def diagnosis_lines(diagnosis: dict[str, Any]) -> list[str]:
    """The prediction, what it consists of, and each change of flags that saves memory."""
    needed, budget = size(diagnosis["device_bytes"]), size(diagnosis["budget_bytes"])
    lines = [title(diagnosis), f"Predicted: {needed} of {budget}.", *breakdown_lines(diagnosis), "What to change:"]
    for change in diagnosis["changes"]:
        if change["saved_bytes"] > 0:
            fits = "fits" if change["fits"] else "does not fit yet"
            lines.append(f"  {as_flags(change['flags'])}: {size(change['device_bytes'])}, {fits}")
    return lines


def remedy(diagnosis: dict[str, Any] | None, problem: str | None) -> str:
    """One sentence: the nearest settings that fit."""
    if diagnosis is None:
        smaller = "--per_device_train_batch_size 1, --per_device_eval_batch_size 1 or a smaller --max_seq_len"
        return f"There is no prediction ({problem}); try {smaller}"
    if diagnosis["nearest"] is not None:
        nearest = diagnosis["nearest"]
        return f"Nearest that fits: {as_flags(nearest['flags'])} ({size(nearest['device_bytes'])})"
    if diagnosis["fits"]:
        needed, budget = size(diagnosis["device_bytes"]), size(diagnosis["budget_bytes"])
        return f"Predicted were {needed} of {budget}: look for other programs that hold memory, or limits on it"
    return "No change of one or more flags would make it fit: a smaller model or a larger card would"


def write_snapshot(folder: Path) -> None:
    """The allocator's blocks and latest allocations, for PyTorch's viewer."""
    if torch.cuda.is_available():
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        print(f"Allocator snapshot: {folder / SNAPSHOT}, see https://docs.pytorch.org/memory_viz", file=sys.stderr)
