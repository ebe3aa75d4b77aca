"""Ends the run on all machines when one of its processes is gone, and says which.

In a collective the others would wait for it: with NCCL until the time-out, with gloo too where a cable is cut. So
every process has a connection to the main process that carries nothing but a farewell. If it is killed, the connection
breaks at once. If its machine loses power or network, it no longer answers the keep-alive probes of the operating
system. They need no Python, so a process that is busy for minutes is not taken for a lost one.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from training.processes import process_name
from utils import UserError, brief_error


# 25 seconds without an answer, and the connection breaks.
PROBES = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3} if sys.platform == "linux" else {}
GRACE_SECONDS = 5  # for a process to end by itself once another is gone
CONNECT_SECONDS = 60
DONE = "done"  # the farewell of a process that has ended well


class Peers:
    """A context in which the run ends, with exit code 1, if another of its processes is killed, fails or is cut off.

    The main process watches all others, they watch the main process, which passes on what it sees. One process a
    machine prints the line that names the lost one.

    Raises:
        UserError: on entry, if a process cannot connect to the main process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.name = process_name(accelerator)
        self.names: dict[socket.socket, str] = {}  # at the other ends
        self.lost: str | None = None
        self.is_lost = threading.Event()
        self.has_told = self.has_reported = False

    def __enter__(self) -> "Peers":
        if self.accelerator.num_processes > 1:
            self._connect()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others. An error of a collective, which a lost process has caused, ends this one in a line."""
        if self.names and isinstance(error, RuntimeError) and self.is_lost.wait(GRACE_SECONDS):
            self._report()
            raise SystemExit(1) from None
        self._tell(DONE if error is None else f"{self.name} has ended early: its own line says why")

    def _connect(self) -> None:
        host, server, secret = os.environ["MASTER_ADDR"], None, secrets.token_hex(8)
        if self.accelerator.is_main_process:
            family = socket.AF_INET6 if (both := socket.has_dualstack_ipv6()) else socket.AF_INET
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        port, secret, main = broadcast_object_list([server and server.getsockname()[1], secret, self.name])
        try:
            if server is None:
                connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
                connection.sendall(json.dumps([secret, self.name]).encode() + b"\n")
                self._add(connection, main)
            else:
                server.settimeout(CONNECT_SECONDS)
                while len(self.names) < self.accelerator.num_processes - 1:
                    self._accept(server, secret)
                server.close()
        except OSError as error:
            raise UserError(
                f"{self.name}: no connection to {host}, port {port} ({brief_error(error)}); machines of a run must "
                "reach each other on all ports"
            ) from None

    def _accept(self, server: socket.socket, secret: str) -> None:
        connection, _ = server.accept()
        connection.settimeout(CONNECT_SECONDS)
        with suppress(OSError, ValueError, TypeError):  # a stranger, such as a port scanner
            # Without a buffer, which would take a farewell that is there already.
            theirs, name = json.loads(connection.makefile("rb", buffering=0).readline(1000))
            if secrets.compare_digest(theirs, secret):
                self._add(connection, name)

    def _add(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in PROBES.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.names[connection] = name

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self.names:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    self._read(key.fileobj)

    def _read(self, connection: socket.socket) -> None:
        """Its farewell. If that is not DONE, end this process, unless it ends by itself for the same reason."""
        name = self.names[connection]
        try:
            farewell = connection.recv(1000).decode() or f"{name} is gone: it was killed, or its machine has failed"
        except OSError as error:
            farewell = f"{name} cannot be reached ({brief_error(error)})"
        if farewell == DONE:
            return
        self.lost = farewell
        self.is_lost.set()
        self._tell(farewell)
        if "ended early" in farewell:  # all processes may be ending, by the same error
            time.sleep(GRACE_SECONDS)
        self._report()
        time.sleep(GRACE_SECONDS)
        os._exit(1)  # the main thread waits in a collective

    def _tell(self, farewell: str) -> None:
        """Send it once; a process that has said farewell is silent."""
        has_told, self.has_told = self.has_told, True
        for connection in () if has_told else self.names:
            with suppress(OSError):
                connection.sendall(farewell.encode())
                connection.shutdown(socket.SHUT_WR)

    def _report(self) -> None:
        has_reported, self.has_reported = self.has_reported, True
        if self.accelerator.is_local_main_process and not has_reported:
            remedy = "The run ends everywhere; go on with --resume_from_checkpoint latest, on these machines or others"
            tqdm.write(f"error: {self.lost}. {remedy}", file=sys.stderr)
