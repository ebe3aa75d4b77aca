"""What ends or disturbs a run: signals, samples that cannot be had, losses that are no numbers."""

import math
import signal
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from utils import BadSample, Interrupted, UserError


SIGNALS = (signal.SIGTERM, signal.SIGINT)
NUM_NAMED = 8  # samples in a message


class Watch:
    """A context in which all processes stop together, between two micro-batches, when one of them has to.

    A signal is only noted while `batches` runs; at any other time it raises Interrupted at once. Several processes
    tell each other on the host, through gloo: no GPU has to wait.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signum = 0
        self.is_noting = False
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> "Watch":
        self.handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if not self.is_noting:
            raise Interrupted(signum)

    def batches(self, loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The loader's batches.

        Raises:
            Interrupted: a process got a signal. BadSample: one of some process cannot be had.
        """
        self.is_noting = True
        iterator = iter(loader)
        while True:
            batch, error = None, None
            try:
                batch = next(iterator, None)  # every process has as many
            except UserError as user_error:
                error = user_error
            signum, num_errors = self._maximum(self.signum, int(error is not None))
            if num_errors:
                raise BadSample(str(error or "another process cannot go on: its line says why")) from None
            if signum:
                raise Interrupted(signum)
            if batch is None:
                break
            yield batch
        self.is_noting = False

    def _maximum(self, *values: int) -> list[int]:
        """The largest of all processes' values, one by one."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return tensor.tolist()


class NonFiniteUpdates:
    """Counts updates that were skipped because of NaN or Inf, names their samples, and ends the run after too many.

    The gradients' norm tells, since NaN anywhere makes it NaN. It is read once an update; losses are read only then.
    A loss scaler makes too large a scale smaller by such skips: while the losses are finite and the scale is not below
    1 they are its own business.
    """

    def __init__(self, accelerator: Accelerator, max_in_a_row: int) -> None:
        self.accelerator = accelerator
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self.micro_batches: list[tuple[torch.Tensor, list[str]]] = []

    def micro_batch(self, loss: torch.Tensor, sample_ids: list[str]) -> None:
        self.micro_batches.append((loss, sample_ids))

    def update(self, step: int, grad_norm: float, loss_scale: float | None) -> bool:
        """Whether the update that ends here was skipped. Raises UserError after `max_in_a_row` such updates."""
        micro_batches, self.micro_batches = self.micro_batches, []
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        bad = [(float(loss), ids) for loss, ids in micro_batches if not math.isfinite(loss)]
        some_loss_is_bad = self._any_process(bool(bad))
        if loss_scale is not None and loss_scale >= 1 and not some_loss_is_bad:
            return True
        self.in_a_row += 1
        if bad or not some_loss_is_bad:
            what = f"the loss is {bad[0][0]}" if bad else f"the gradients' norm is {grad_norm}"
            ids = [sample_id for _, ids in bad or micro_batches for sample_id in ids]
            print(f"warning: step {step} is skipped: {what} in samples {name_some(ids)}", file=sys.stderr, flush=True)
        if self.in_a_row == self.max_in_a_row:
            raise UserError(
                f"{self.in_a_row} updates in a row up to step {step} had a NaN or infinite loss or gradient and were "
                "skipped. Lower --learning_rate, look at the samples named above or choose --mixed_precision bf16; "
                "the last checkpoint is from before them"
            )
        return True

    def _any_process(self, value: bool) -> bool:
        """Called where all processes skip, since all of them have the same norm."""
        if self.accelerator.distributed_type == DistributedType.NO:
            return value
        return bool(self.accelerator.reduce(torch.tensor(float(value), device=self.accelerator.device), "sum") > 0)


def name_some(names: list[str]) -> str:
    """A list that stays readable: the first few, and how many more."""
    rest = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + rest
