"""Start a step as a launcher would: the launcher's environment, and processes of its own."""

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from random import SystemRandom
from typing import Any, TypeVar
from unittest.mock import patch

from child_processes import process_pool
from memory.strategy import Strategy
from utils import quiet_libraries


Result = TypeVar("Result")
_is_fresh = False


@contextmanager
def launched(strategy: Strategy, splits_weights: bool = False, gpu: bool = False) -> Iterator[None]:
    """What accelerate's launcher would set in the environment of rank 0, for the processes started inside.

    Args:
        splits_weights: `zero3_init_flag`: weights are split as they are read.
        gpu: whether the computer's GPUs are seen.
    """
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(strategy.world_size),
        "LOCAL_WORLD_SIZE": str(strategy.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        if strategy.name == "fsdp2":
            settings = {key.upper(): str(value) for key, value in strategy.fsdp_config.items()}
            environment |= {"ACCELERATE_USE_FSDP": "true"} | settings
        if strategy.deepspeed_config:
            path = Path(folder) / "deepspeed.json"
            path.write_text(json.dumps(strategy.deepspeed_config))
            environment |= {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(splits_weights).lower(),
            }
        with patch.dict(os.environ, environment):
            yield


def free_port() -> int:
    """A port of this computer that nothing listens on. It is none of those that systems give to connections: it might
    be given to one before it is used."""
    for port in SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("100 ports from 20000 to 31999 are all taken")


def in_fresh_process(
    function: Callable[..., Result], *arguments: Any, method: str = "spawn", preload: str | None = None
) -> Result:
    """What `function` returns in a process of its own, which inherits no state of DeepSpeed, accelerate or CUDA.

    `method` and `preload` are process_pool's. What the function prints goes to stderr. An error of a library comes
    back as a plain ValueError or RuntimeError. In a process that `begin_fresh` has begun it runs at once.
    """
    if _is_fresh:
        return _run(function, *arguments)
    with process_pool(method=method, preload=preload) as pool:
        return pool.submit(_run, function, *arguments).result()


def begin_fresh() -> None:
    """The initializer of a pool's process that does one thing and ends: it needs no other process for it."""
    global _is_fresh
    _is_fresh = True


def on_every_rank(function: Callable[..., Result], world_size: int, *arguments: Any) -> list[Result]:
    """The same for the processes of a launch, which run at the same time."""
    with process_pool(world_size) as pool:
        runs = [pool.submit(_run_as, rank, function, *arguments) for rank in range(world_size)]
        return [run.result() for run in runs]


def _run_as(rank: int, function: Callable[..., Result], *arguments: Any) -> Result:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return _run(function, *arguments)


def _run(function: Callable[..., Result], *arguments: Any) -> Result:
    quiet_libraries()
    with redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, where the last line is a script's result
        try:
            return function(*arguments)
        except (ValueError, RuntimeError) as error:  # a library's own class may not survive pickling
            plain_type = ValueError if isinstance(error, ValueError) else RuntimeError
            raise plain_type(str(error)) from error
