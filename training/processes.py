"""What processes tell each other, on one machine or several: files may lie on the main process's disk alone."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from utils import UserError


T = TypeVar("T")


def process_name(accelerator: Accelerator) -> str:
    return f"rank {accelerator.process_index} on {socket.gethostname()}"


@contextmanager
def main_processes_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process goes first, then the first of each other machine, then the rest.

    So files are made once where machines share a disk, and once on each where they do not.
    """
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        yield


def of_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, on all processes. It is called there alone.

    Raises:
        UserError: `function` raised it; then all processes do.
    """
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    (outcome,) = broadcast_object_list([outcome])
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def items_of_main(accelerator: Accelerator, function: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The same, for an iterator's items, one at a time and through host memory."""
    if accelerator.num_processes == 1:
        yield from function()
        return
    group = torch.distributed.new_group(backend="gloo")
    items = function() if accelerator.is_main_process else iter(())
    while True:
        item = [next(items, None)]  # None: there are no more
        torch.distributed.broadcast_object_list(item, src=0, group=group)
        if item[0] is None:
            break
        yield item[0]


def check_same(accelerator: Accelerator, values: dict[str, Any]) -> None:
    """Raise UserError, on all processes, if one has other values than the main process; it names both."""
    first, *others = gather_object([(process_name(accelerator), values)])
    for name, other in others:
        differences = [key for key in values if other[key] != first[1][key]]
        if differences:
            shown = "; ".join(f"{key} is {first[1][key]} there, {other[key]} here" for key in differences)
            raise UserError(
                f"{name} differs from {first[0]}: {shown}. Start all machines with the same data and flags"
            )
