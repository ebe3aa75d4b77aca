"""Several machines: the network interface by which this one reaches the main process."""

import os
import socket
from contextlib import closing

import psutil


GLOO_INTERFACE, NCCL_INTERFACE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def num_processes() -> int:
    """Of the launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def choose_interface() -> None:
    """Let gloo use the interface that leads to the main process, unless the user has chosen one.

    By itself gloo takes the address that the machine's name stands for: on many systems 127.0.1.1, which no other
    machine reaches. NCCL looks for an interface itself. Call before the processes join.
    """
    is_spread = num_processes() > int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if is_spread and GLOO_INTERFACE not in os.environ and (interface := interface_to_main()):
        os.environ[GLOO_INTERFACE] = interface


def interface_to_main() -> str | None:
    """The name of the interface on the way to MASTER_ADDR; None if there is no way, or only this machine's own."""
    own = address_to(os.environ["MASTER_ADDR"])
    if own is None or own.startswith("127.") or own == "::1":
        return None
    names = [name for name, addresses in psutil.net_if_addrs().items() if own in (each.address for each in addresses)]
    return names[0] if names else None


def address_to(host: str) -> str | None:
    """This machine's address on the way to `host`. Sends nothing: only the routing table is asked."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return None
