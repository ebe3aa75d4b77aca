"""The interface that leads to the main process."""

import os
from types import SimpleNamespace

import psutil
import pytest

from training import network
from training.network import GLOO_INTERFACE, address_to, choose_interface


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(GLOO_INTERFACE, "")
    monkeypatch.delenv(GLOO_INTERFACE)
    interfaces = {"lo": ["127.0.0.1"], "eth0": ["192.168.0.2"], "ib0": ["fe80::2", "10.0.0.2"]}
    found = {name: [SimpleNamespace(address=address) for address in each] for name, each in interfaces.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(("address", "chosen"), [("10.0.0.2", "ib0"), ("127.0.1.1", None), (None, None)])
def test_gloo_takes_the_way_to_the_main_process(
    address: str | None, chosen: str | None, two_machines: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the machine's own loopback, which no other machine reaches."""
    monkeypatch.setattr(network, "address_to", lambda host: address)
    choose_interface()
    assert os.environ.get(GLOO_INTERFACE) == chosen


@pytest.mark.parametrize(("variable", "value"), [(GLOO_INTERFACE, "eth0"), ("LOCAL_WORLD_SIZE", "2")])
def test_what_is_left_alone(variable: str, value: str, two_machines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's choice, and a run on one machine."""
    monkeypatch.setattr(network, "address_to", lambda host: "10.0.0.2")
    monkeypatch.setenv(variable, value)
    choose_interface()
    assert os.environ.get(GLOO_INTERFACE) == (value if variable == GLOO_INTERFACE else None)


def test_address() -> None:
    assert address_to("127.0.0.1") == "127.0.0.1"
    assert address_to("no.such.host.invalid") is None
