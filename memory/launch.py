"""Start a step as a launcher would: its environment, in a process of its own."""

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


@contextmanager
def launched(
    deepspeed_config: dict[str, Any],
    world_size: int = 1,
    splits_weights: bool = False,
    gpu: bool = False,
) -> Iterator[None]:
    """What accelerate's launcher would set in the environment of rank 0, for the processes started inside.

    Args:
        deepspeed_config: what `deepspeed_config_file` holds; empty: no DeepSpeed.
        splits_weights: `zero3_init_flag`, as weights are read.
        gpu: whether the computer's GPUs are seen.
    """
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        if deepspeed_config:
            path = Path(folder) / "deepspeed.json"
            path.write_text(json.dumps(deepspeed_config))
            environment |= {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(splits_weights).lower(),
            }
        with patch.dict(os.environ, environment):
            yield


def free_port() -> int:
    """A port of this computer that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
