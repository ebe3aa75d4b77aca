"""Two machines on one: network namespaces that a cable joins, each with a process tree and a disk of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from memory.launch import free_port


ROOT = Path(__file__).parent.parent
ADDRESSES = ("10.99.0.1", "10.99.0.2")
BIN = Path(sys.executable).parent  # of the launchers


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class TwoNodes:
    """`disk` is a folder that has other files on each node: node i sees `folder/i` there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.names = [f"node{i}-{os.getpid()}" for i in range(2)]
        self.ports = [f"veth{i}-{os.getpid()}"[-15:] for i in range(2)]
        self.started: dict[int, subprocess.Popen] = {}
        for place in (self.disk, *(self.disk_of(i) for i in range(2))):
            place.mkdir(parents=True)

    def __enter__(self) -> "TwoNodes":
        if sys.platform != "linux" or shutil.which("ip") is None:
            pytest.skip("no command ip (Linux, package iproute2): it makes network namespaces")
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", self.ports[0], "type", "veth", "peer", "name", self.ports[1])
            for name, port, address in zip(self.names, self.ports, ADDRESSES, strict=True):
                ip("link", "set", port, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", port)
                ip("-n", name, "link", "set", port, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted here ({error}); root has them, in most containers not")
        return self

    def __exit__(self, *_: object) -> None:
        for i, name in enumerate(self.names):
            with suppress(OSError):
                self.kill(i)
                ip("netns", "del", name)  # the cable goes with it

    def disk_of(self, node: int) -> Path:
        return self.folder / str(node)

    def start(self, node: int, *command: str) -> None:
        """A command from the launchers' folder, at the top of the repository. Its output goes to `log`."""
        places = [str(self.disk_of(node)), str(self.disk)]
        caches = self.disk_of(node) / "datasets_cache"
        caches.mkdir(exist_ok=True)
        words = ["sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh", *places]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.disk / "datasets_cache")}
        for variable in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(variable, None)
        with open(self.log_file(node), "w") as log:
            self.started[node] = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *words, str(BIN / command[0]), *command[1:]],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log_file(self, node: int) -> Path:
        return self.folder / f"{node}.log"

    def log(self, node: int) -> str:
        return self.log_file(node).read_text()

    def wait(self, node: int, timeout: float = 240) -> int:
        """The launcher's exit code."""
        try:
            return self.started[node].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {node} still runs after {timeout} s:\n{self.log(node)[-3000:]}") from None

    def wait_for(self, node: int, words: str, timeout: float = 180) -> None:
        """Until the node's log has these words."""
        deadline = time.monotonic() + timeout
        while words not in self.log(node):
            assert time.monotonic() < deadline and self.started[node].poll() is None, self.log(node)[-3000:]
            time.sleep(0.05)

    def wait_until_empty(self, node: int, timeout: float = 60) -> None:
        """Until no process is left on the node."""
        deadline = time.monotonic() + timeout
        while pids := ip("netns", "pids", self.names[node]).split():
            assert time.monotonic() < deadline, f"processes {pids} are left on node {node}"
            time.sleep(0.1)

    def kill(self, node: int) -> None:
        """SIGKILL to all processes of the node."""
        for pid in ip("netns", "pids", self.names[node]).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", self.ports[1], "down")

    def free_port(self) -> int:
        return free_port()


def accelerate_line(node: int, config: str, port: int, *extra: str) -> list[str]:
    """The line of docs/scaling.md."""
    machines = f"--num_machines 2 --num_processes 2 --machine_rank {node}"
    main = f"--main_process_ip {ADDRESSES[0]} --main_process_port {port}"
    return ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml",
            *machines.split(), *main.split(), *extra, "train.py"]  # fmt: skip


def torchrun_line(node: int, port: int) -> list[str]:
    """The line of docs/scaling.md."""
    machines = f"--nnodes 2 --nproc_per_node 1 --node_rank {node}"
    return ["torchrun", *machines.split(), "--master_addr", ADDRESSES[0], "--master_port", str(port), "train.py"]
