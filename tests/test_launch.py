"""The environment of a launch."""

import os
import socket

from memory.launch import launched
from memory.strategy import Strategy


def test_every_launch_takes_a_free_port() -> None:
    """Two at once differ, and nothing listens there."""
    ports = []
    for _ in range(2):
        with launched(Strategy()):
            ports.append(int(os.environ["MASTER_PORT"]))
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", ports[-1]))
    assert ports[0] != ports[1]
