"""What processes tell each other, with the exchange itself replaced. tests/test_nodes.py has it for real."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from threading import Barrier
from types import SimpleNamespace

import pytest

from training import processes
from training.processes import check_same, items_of_main, main_processes_first, of_main
from utils import UserError


def fail() -> None:
    raise UserError("no such checkpoint")


def test_the_main_process_reads_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others get its result, or its error, and do not call the function."""
    monkeypatch.setattr(processes, "broadcast_object_list", lambda objects: sent.append(objects[0]) or objects)
    sent = []
    main = SimpleNamespace(is_main_process=True)
    assert of_main(main, lambda: 5) == 5
    with pytest.raises(UserError, match="no such checkpoint"):
        of_main(main, fail)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda objects: [sent.pop(0)])
    other = SimpleNamespace(is_main_process=False)
    assert of_main(other, fail) == 5
    with pytest.raises(UserError, match="no such checkpoint"):
        of_main(other, lambda: 5)


class FakeAccelerator:
    """Of two machines with two processes each, as threads; accelerate's contexts as it documents them."""

    def __init__(self, rank: int, barrier: Barrier) -> None:
        self.rank, self.barrier = rank, barrier

    @contextmanager
    def goes_first(self, is_first: bool) -> Iterator[None]:
        if not is_first:
            self.barrier.wait(5)
        yield
        if is_first:
            self.barrier.wait(5)

    def main_process_first(self) -> AbstractContextManager:
        return self.goes_first(self.rank == 0)

    def local_main_process_first(self) -> AbstractContextManager:
        return self.goes_first(self.rank % 2 == 0)


def test_data_is_prepared_once_then_once_a_machine() -> None:
    """The main process, the first of the other machine, the rest."""
    barrier, order = Barrier(4), []

    def prepare(rank: int) -> None:
        with main_processes_first(FakeAccelerator(rank, barrier)):
            order.append(rank)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(prepare, range(4)))
    assert order[:2] == [0, 2] and sorted(order) == [0, 1, 2, 3]


def test_one_process_sends_nothing() -> None:
    assert list(items_of_main(SimpleNamespace(num_processes=1), lambda: iter("ab"))) == ["a", "b"]


def test_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose, which, and both values."""
    there, here = {"seed": 42, "data": "a"}, {"seed": 43, "data": "a"}
    for other in (there, here):
        gathered = [("rank 0 on one", there), ("rank 1 on two", other)]
        monkeypatch.setattr(processes, "gather_object", lambda _, gathered=gathered: gathered)
        if other is there:
            check_same(SimpleNamespace(process_index=0), there)
    expected = "rank 1 on two differs from rank 0 on one: seed is 42 there, 43 here"
    with pytest.raises(UserError, match=expected):
        check_same(SimpleNamespace(process_index=0), there)
