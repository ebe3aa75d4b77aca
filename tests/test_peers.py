"""A run's processes watch each other: real ones, without a model. tests/test_nodes.py has whole runs."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import peers
from training.peers import Peers
from utils import UserError


HOST = socket.gethostname()


def sleep() -> None:
    time.sleep(30)


def end_well() -> None:
    pass


def end_later() -> None:
    time.sleep(1)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise UserError("bad input")


def fail_in_a_collective() -> None:
    time.sleep(0.3)
    raise RuntimeError("Connection closed by peer")


def be_rank(
    rank: int, num_processes: int, ending: Callable[[], None], shared: multiprocessing.Queue, log: Path
) -> None:
    sys.stderr = open(log, "w", buffering=1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    peers.GRACE_SECONDS = 1

    def broadcast(objects: list) -> list:
        for _ in range(num_processes - 1 if rank == 0 else 0):
            shared.put(objects)
        return objects if rank == 0 else shared.get()

    peers.broadcast_object_list = broadcast
    each = SimpleNamespace(process_index=rank, num_processes=num_processes, is_main_process=rank == 0)
    each.is_local_main_process = True
    with Peers(each):
        ending()


def run_ranks(tmp_path: Path, *endings: Callable[[], None]) -> list[tuple[int, str]]:
    """The exit code of each rank, and what it has printed."""
    context = multiprocessing.get_context("fork")
    shared, logs = context.Queue(), [tmp_path / f"{rank}.log" for rank in range(len(endings))]
    processes = [
        context.Process(target=be_rank, args=(rank, len(endings), ending, shared, logs[rank]))
        for rank, ending in enumerate(endings)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(15)
        assert process.exitcode is not None, "it waits for a lost process"
    return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_is_killed(lost: int, tmp_path: Path) -> None:
    """All others end, and name it; what the others have of rank 1 they have from rank 0."""
    endings = [sleep, sleep, sleep]
    endings[lost] = be_killed
    for rank, (code, text) in enumerate(run_ranks(tmp_path, *endings)):
        assert code == (-signal.SIGKILL if rank == lost else 1)
        assert rank == lost or text.count(f"error: rank {lost} on {HOST} is gone") == 1, text


def test_the_error_of_a_collective_is_one_line(tmp_path: Path) -> None:
    """No traceback beside the line that says why."""
    (code, text), _ = run_ranks(tmp_path, fail_in_a_collective, be_killed)
    assert code == 1 and len(text.strip().splitlines()) == 1 and f"rank 1 on {HOST} is gone" in text


def test_an_error_of_its_own_is_kept(tmp_path: Path) -> None:
    """A RuntimeError while all processes are there."""
    (code, text), (other, _) = run_ranks(tmp_path, fail_in_a_collective, sleep)
    assert code == 1 and "RuntimeError: Connection closed by peer" in text and other == 1


def test_a_process_that_ends_before_the_others(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, end_later, end_well) == [(0, "")] * 2
    assert run_ranks(tmp_path, end_well, end_later) == [(0, "")] * 2


def test_a_process_that_ends_before_it_is_accepted() -> None:
    """Its farewell is read, though it has come together with its name."""
    server, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
    client.connect(server.getsockname())
    client.sendall(b'["secret", "rank 1"]\n' + peers.DONE.encode())
    client.close()
    main = Peers(SimpleNamespace(process_index=0, num_processes=2))
    main._accept(server, "secret")
    (connection,) = main.names
    main._read(connection)
    assert main.lost is None


def test_a_process_that_fails(tmp_path: Path) -> None:
    """Alone: the others end. With the others: each ends by its own error, and has no second line."""
    _, (code, text) = run_ranks(tmp_path, fail, sleep)
    assert code == 1 and f"error: rank 0 on {HOST} has ended early: its own line says why" in text
    for _, text in run_ranks(tmp_path, fail, fail):
        assert "UserError: bad input" in text and "ended early" not in text


@pytest.mark.parametrize("line", [b'["guessed", "rank 1"]\n', b"[1, 2]\n", b"1\n", b"GET / HTTP/1.1\r\n", b"\xff\n"])
def test_a_stranger_is_no_peer(line: bytes) -> None:
    """What connects without the run's secret is not counted."""
    server, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
    client.connect(server.getsockname())
    client.sendall(line)
    main = Peers(SimpleNamespace(process_index=0, num_processes=2))
    main._accept(server, "secret")
    assert main.names == {}
