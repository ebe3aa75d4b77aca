"""What ends or disturbs a run: signals, a lost launcher or worker, samples that cannot be loaded, NaN losses."""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch.distributed import ReduceOp
from tqdm.auto import tqdm

from data.batch import Batch, UnusableSample
from data.dataset import ConversationDataset
from data.sharing import SHARED_MEMORY_REMEDY
from training.run_log import RunLog
from utils import BadSample, Interrupted, LostWorker, UserError, name_some


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher's command line has one of these words: the scripts that pip installs, or the modules behind `python -m`.
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}


class Watch:
    """A context in which all processes stop together, between two micro-batches, if one of them must stop.

    While `batches` runs a signal is only noted; at any other time it raises Interrupted at once. Processes exchange
    their signals on the host, through gloo, so that no GPU waits.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signum = 0
        self.is_noting = False
        self.child_handler = signal.getsignal(signal.SIGCHLD)
        self.launcher = find_launcher()
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

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches.

        Raises:
            Interrupted: a process got a signal.
            BadSample: a sample of some process cannot be loaded.
            LostWorker: a data worker of some process has died.
        """
        self.is_noting = True
        iterator = iter(loader)
        while True:
            batch, error = None, None
            try:
                batch = self._fetch(iterator)  # every process has the same number of batches
            except UserError as user_error:
                error = user_error
            if self.launcher not in (None, os.getppid()):
                self.signum = signal.SIGTERM
            severity = 0 if error is None else 1 + isinstance(error, LostWorker)
            signum, worst = self.reduce([self.signum, severity], ReduceOp.MAX)
            if worst:
                message = str(error or "another process cannot go on: its line says why")
                raise (LostWorker if worst == 2 else BadSample)(message) from None
            if signum:
                raise Interrupted(signum)
            if batch is None:
                break
            try:
                yield batch
            except GeneratorExit:  # the loop that reads the batches has ended
                self.is_noting = False
                raise
        self.is_noting = False

    def _fetch(self, iterator: Iterator[Batch]) -> Batch | None:
        """The next batch; None at the end. Raises LostWorker.

        torch installs a SIGCHLD handler with the first workers. It raises wherever the main thread is, even in the
        middle of an optimizer step, after which nothing could be saved. So it is installed only in here.
        """
        signal.signal(signal.SIGCHLD, self.child_handler)
        try:
            self._raise_for_dead_worker()  # one may have died since the last batch
            try:
                return next(iterator, None)
            except (OSError, EOFError):  # its worker died while it handed the batch over
                time.sleep(2)  # the system may report the death a little later; the handler raises then
                self._raise_for_dead_worker()
                raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise LostWorker(explain_death(str(error))) from None
        finally:
            self.child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _raise_for_dead_worker(self) -> None:
        if callable(self.child_handler):
            self.child_handler(signal.SIGCHLD, None)

    def reduce(self, values: list[int], op: ReduceOp.RedOpType) -> list[int]:
        """The values reduced over all processes, element by element."""
        if self.group is None:
            return values
        tensor = torch.tensor(values)
        torch.distributed.all_reduce(tensor, op, group=self.group)
        return tensor.tolist()


class BadSamples:
    """Subtracts bad samples' label tokens from the update's, reports each sample once, ends a run with too many.

    Args:
        log: keeps `bad_samples` for a resumed run, by index because ids may repeat, and `num_left_out`.
        dataset: its `problems` were left out when it was read.
    """

    def __init__(self, watch: Watch, log: RunLog, dataset: ConversationDataset, max_bad_fraction: float) -> None:
        self.watch = watch
        self.log = log
        self.log.num_left_out = len(dataset.problems)
        self.num_records, self.max_bad_fraction = len(dataset) + len(dataset.problems), max_bad_fraction
        self.num_items_in_batch = self.num_expected = 0

    def count(self, batch: Batch, num_items_in_batch: int) -> int:
        """The update's label tokens on all processes without those of its bad samples; at least 1.

        Raises:
            BadSample: more than `max_bad_fraction` of the data set is bad.
            UserError: a file could be read a moment ago and cannot now.
        """
        if batch.bad is None:
            return num_items_in_batch
        if batch.bad_in_update is not None:  # an update begins
            num_lost = sum(sample.num_label_tokens for sample in batch.bad_in_update)
            num_lost, num_bad = self.watch.reduce([num_lost, len(batch.bad_in_update)], ReduceOp.SUM)
            self.num_items_in_batch = max(1, num_items_in_batch - num_lost)
            self.num_expected = len(batch.bad_in_update)
            if num_bad:
                self._report(batch.bad_in_update)
        self.num_expected -= len(batch.bad)
        if self.num_expected < 0:
            raise UserError(f"{batch.bad[0].problem}: it could be read a moment ago; is the disk in order?")
        return self.num_items_in_batch

    def _report(self, bad_samples: list[UnusableSample]) -> None:
        """Warn of each sample once. All processes call this together."""
        known = set(self.log.bad_samples)
        for sample in bad_samples:
            if sample.index not in known:
                warn(f"left out: {sample.problem}")
        self.log.bad_samples = sorted(known.union(sample.index for sample in gather_object(bad_samples)))
        check_bad_fraction(self.log.num_bad_samples, self.num_records, self.max_bad_fraction, BadSample)


def explain_death(message: str) -> str:
    """What torch's message about a dead worker means, and what helps."""
    pids = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", message)
    who = f"a data worker (process {pids[1]})" if pids else "a data worker"
    if "Bus error" in message:
        return f"{who} found no more shared memory: {SHARED_MEMORY_REMEDY}"
    if "signal: Killed" in message or message.endswith("exited unexpectedly"):  # torch has missed the signal
        why = "most likely because the host ran out of memory ('dmesg' tells)"
        return f"{who} was killed, {why}: choose fewer --dataloader_num_workers"
    how = re.search(r"(?:is killed by|exited) .*", message)
    return f"{who} died ({how[0].strip(' .') if how else message})"


def find_launcher() -> int | None:
    """The parent's process id if the parent is a launcher, else None.

    A launcher that is terminated may leave the run behind, which then keeps the GPU: so the run ends too. A run that a
    shell has put into the background goes on when the shell ends.
    """
    with suppress(psutil.Error):  # a parent outside the container cannot be seen
        parent = psutil.Process().parent()
        if parent is not None and not LAUNCHERS.isdisjoint(Path(word).name for word in parent.cmdline()):
            return parent.pid
    return None


def check_bad_fraction(
    num_bad: int, num_records: int, max_bad_fraction: float, error_class: type[UserError] = UserError
) -> None:
    """Raise `error_class` if more than `max_bad_fraction` of the records are bad."""
    if num_bad > max_bad_fraction * num_records:
        raise error_class(
            f"{num_bad} of {num_records} samples cannot be used, more than --max_bad_fraction {max_bad_fraction}: "
            "python -m data.check lists them all"
        )


class NonFiniteUpdates:
    """Counts updates skipped because of NaN or Inf, names their samples, and ends the run after too many in a row.

    NaN in any gradient makes their norm NaN, so only the norm is read after each update; losses are read if it is not
    finite. An fp16 loss scaler skips updates on purpose while it lowers its scale: such a skip does not count as long
    as all losses are finite and the scale is at least 1.
    """

    def __init__(self, accelerator: Accelerator, max_in_a_row: int) -> None:
        self.accelerator = accelerator
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self.micro_batches: list[tuple[torch.Tensor, list[str]]] = []

    def micro_batch(self, loss: torch.Tensor, sample_ids: list[str]) -> None:
        self.micro_batches.append((loss, sample_ids))

    def update(self, step: int, grad_norm: float, loss_scale: float | None) -> bool:
        """Whether the update that has just ended was skipped. Raises UserError after `max_in_a_row` such updates."""
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
            warn(f"step {step} is skipped: {what} in samples {name_some(ids)}")
        if self.in_a_row == self.max_in_a_row:
            raise UserError(
                f"{self.in_a_row} updates in a row up to step {step} had a NaN or infinite loss or gradient and were "
                "skipped. Lower --learning_rate, look at the samples named above or choose --mixed_precision bf16; "
                "the last checkpoint is from before them"
            )
        return True

    def _any_process(self, value: bool) -> bool:
        """Whether it is true on any process. All processes call together: all have the same norm, so all skip."""
        if self.accelerator.distributed_type == DistributedType.NO:
            return value
        return bool(self.accelerator.reduce(torch.tensor(float(value), device=self.accelerator.device), "sum") > 0)


def warn(message: str) -> None:
    """Print on stderr, on a line of its own even while a progress bar is drawn."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
