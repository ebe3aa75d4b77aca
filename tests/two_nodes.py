"""Two machines on one: network namespaces that a link joins, each with a process tree and a disk of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
ADDRESSES = ("10.99.0.1", "10.99.0.2")
BIN = Path(sys.executable).parent  # of the launchers
SETTLE = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
LAUNCH_VARIABLES = ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")


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
                ip("netns", "del", name)  # the link goes with it

    def disk_of(self, node: int) -> Path:
        return self.folder / str(node)

    def start(self, node: int, *command: str, **variables: str) -> None:
        """Start a launcher's command at the top of the repository. `log` has its output."""
        words = ["unshare", "--uts", "sh", "-c", SETTLE, "sh", f"node{node}", str(self.disk_of(node)), str(self.disk)]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        environment["PATH"] = f"{BIN}:{environment['PATH']}"
        environment |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.disk / "datasets_cache"), **variables}
        with open(self.log_file(node), "w") as log:
            self.started[node] = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *words, *command],
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
        """Cut the link."""
        ip("-n", self.names[1], "link", "set", self.ports[1], "down")


def accelerate_line(node: int, port: int, config: str = "ddp") -> list[str]:
    """As docs/scaling.md has it."""
    line = f"accelerate launch --config_file accelerate_configs/{config}.yaml --num_machines 2 --num_processes 2"
    line += f" --machine_rank {node} --main_process_ip {ADDRESSES[0]} --main_process_port {port}"
    if config.startswith("zero"):
        line += " --deepspeed_multinode_launcher standard"
    return [*line.split(), "train.py"]


def slurm_line(node: int, port: int, config: str = "ddp") -> list[str]:
    """launch/slurm.sh, as on the node that `srun` starts it on: `srun` runs the command that it is given."""
    variables = f"SLURM_NNODES=2 SLURM_NODEID={node} SLURM_JOB_ID={port} SLURM_JOB_NODELIST={ADDRESSES[0]}"
    script = 'srun() { "${@:2}"; }; scontrol() { echo $3; }; . launch/slurm.sh'
    return ["env", *variables.split(), f"CONFIG={config}", "bash", "-c", script, "slurm.sh"]


def torchrun_line(node: int, port: int) -> list[str]:
    """As docs/scaling.md has it."""
    line = f"torchrun --nnodes 2 --nproc_per_node 1 --node_rank {node}"
    line += f" --master_addr {ADDRESSES[0]} --master_port {port} train.py"
    return line.split()
