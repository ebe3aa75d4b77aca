"""Runs of train.py in processes of their own, forked from one that has imported all: killed and starved for real.

A run may be given faults: `Fault("training.checkpoint_files.write_durably", 2, "kill")` kills it as it enters that
function for the second time.
"""

import errno
import functools
import json
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from memory.launch import free_port
from utils import BadSample


ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Fault:
    """What happens as the function is entered for the `call`-th time, and the next ones up to `times`.

    `action`: a key of SIGNALS or ERRORS; `little memory`, 256 MiB more than now, on a GPU 64; for a forward pass
    `nan`, its loss, or `infinite gradient`, not its loss.
    """

    function: str
    call: int
    action: str
    times: int = 1


@dataclass
class Ended:
    """Exit code (negative: the signal), and what the main process wrote."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err and lines, self.err[-2000:]
        return lines[0]


class Run:
    """A run that has been started; `wait` ends it."""

    def __init__(
        self, flags: str, folder: Path, config: str = "single", num_processes: int = 1, faults: tuple[Fault, ...] = ()
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        if torch.cuda.is_available():
            context = multiprocessing.get_context(
                "spawn"
            )  # importing DeepSpeed asks for the GPU, and then no fork has it
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["train", "deepspeed", "forked_runs"])
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = launch_environment(config, num_processes)
        ranks = range(num_processes)
        arguments = [(flags.split(), folder, environment, rank, faults if rank == 0 else ()) for rank in ranks]
        self.processes = [context.Process(target=_run, args=args) for args in arguments]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 240) -> Ended:
        deadline = time.monotonic() + timeout
        self.processes[0].join(timeout)
        for process in self.processes[1:]:
            died = self.processes[0].exitcode not in (0, 2, 130, 143)
            process.join(0.1 if died else max(1.0, deadline - time.monotonic()))
            if process.is_alive():  # what the launcher does
                process.kill()
                process.join()
        assert self.processes[0].exitcode is not None, f"still runs after {timeout} s"
        out, err = ((self.folder / f"0.{stream}").read_text() for stream in ("out", "err"))
        return Ended(self.processes[0].exitcode, out, err)

    def send(self, signum: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signum)


def run(flags: str, folder: Path, *args: Any, **kwargs: Any) -> Ended:
    return Run(flags, folder, *args, **kwargs).wait()


def launch_environment(config: str, num_processes: int) -> dict[str, str]:
    """What accelerate's launcher sets for accelerate_configs/<config>.yaml."""
    environment = {}
    if config.startswith("zero"):
        environment = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"accelerate_configs/deepspeed_{config}.json",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(config == "zero3").lower(),
        }
    if config == "fsdp2":
        settings = yaml.safe_load((ROOT / "accelerate_configs/fsdp2.yaml").read_text())["fsdp_config"]
        environment = {"ACCELERATE_USE_FSDP": "true"}
        for key, value in settings.items():
            environment[key.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    if config != "single":
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
        environment["LOCAL_WORLD_SIZE"] = str(num_processes)
    return environment


def _run(flags: list[str], folder: Path, environment: dict[str, str], rank: int, faults: tuple[Fault, ...]) -> None:
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    if environment:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    multiprocessing.set_start_method("fork", force=True)  # a run's data workers are its own children, and end with it
    sys.argv = ["train.py", *flags, "--no_forecast"]  # it would be a process beside each run, on two cores
    for fault in faults:
        install(fault)
    import train
    from utils import run_script

    run_script(train.main, train.TrainConfig)


def install(fault: Fault) -> None:
    """Put the fault in place in this process."""
    path, _, name = fault.function.rpartition(".")
    owner = pkgutil.resolve_name(path)
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        is_due = fault.call <= calls < fault.call + fault.times
        if is_due and fault.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.action])
        if is_due and fault.action == "little memory":
            allow_little_memory()
        if is_due and fault.action in ERRORS:
            raise ERRORS[fault.action]
        result = original(*args, **kwargs)
        if is_due and fault.action == "nan":
            result.loss = result.loss * float("nan")
        if is_due and fault.action == "infinite gradient":
            result.loss.register_hook(lambda grad: grad * float("inf"))
        return result

    setattr(owner, name, faulty)


def allow_little_memory() -> None:
    """A bit more than is in use: on a GPU of its allocator's memory, else of address space."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        allowed_bytes = torch.cuda.memory_reserved() + 2**26
        torch.cuda.set_per_process_memory_fraction(allowed_bytes / torch.cuda.get_device_properties(0).total_memory)
    else:
        used_bytes = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2**28, resource.RLIM_INFINITY))


SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
ERRORS = {
    "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "out of memory": torch.OutOfMemoryError("Tried to allocate 500.00 MiB"),
    "bad sample": BadSample("image 7.png cannot be decoded, replace it"),
}
