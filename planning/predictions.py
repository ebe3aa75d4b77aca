"""Predictions of many steps: in parallel processes, each kept on the disk, so that an interrupted plan goes on.

    with Predictions(report) as predictions:
        first, second = predictions.of([config, replace(config, per_device_train_batch_size=2)])
        first.device_bytes, first.problem

A prediction is kept under all that it depends on: the flags, the model's files, this code, the libraries' versions
and the allocator's settings. A step that is refused is not kept: why may depend on more, such as what is installed.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import psutil

from child_processes import process_pool
from memory.config import ProbeConfig
from memory.launch import begin_fresh
from memory.predict import predict
from models.loading import load_config
from step import check_model
from utils import GIB, UserError, allocator_settings, quiet_libraries, write_json


ROOT = Path(__file__).parent.parent
# What a prediction runs, and the packages of which it runs code. A launch config is in the key with what it says.
CODE = ("memory", "step.py", "models", "mgm", "chat", "data", "layers", "utils.py")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
PROCESS_BYTES = int(1.5 * GIB)  # resident memory of a process that has traced steps of MGM-2B under ZeRO-3: 1.3 GiB
FIGURES = ("peak_allocated_bytes", "device_bytes", "host_bytes", "step_seconds", "tokens_per_second")
# Flags on which no figure depends.
IRRELEVANT = ("mode", "budget_gib", "sweep", "output", "explain", "calibrate")


@dataclass(frozen=True)
class Prediction:
    """What a step needs; or why there is none, in `problem`."""

    config: ProbeConfig
    peak_allocated_bytes: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    problem: str | None = None


class Predictions:
    """Predicts steps, two or more at a time where there are cores and RAM.

    Args:
        report: is told of each prediction as it is done, and whether it was known before.
        folder: where predictions are kept.
    """

    def __init__(self, report: Callable[[Prediction, bool], None], folder: Path | None = None) -> None:
        self.report = report
        self.folder = folder or cache_folder()
        self._pools: dict[bool, ProcessPoolExecutor] = {}  # by whether DeepSpeed runs in them

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """After an error or Ctrl-C nothing waits for predictions that are under way."""
        for process in active_children() if error is not None else ():
            process.kill()
        for pool in self._pools.values():
            pool.shutdown(wait=error is None, cancel_futures=True)

    def of(self, configs: Iterable[ProbeConfig]) -> list[Prediction]:
        """A prediction of each, in order."""
        configs = list(configs)
        keys = [key_of(config) for config in configs]
        found: dict[str, Prediction] = {}
        running: dict[Future, tuple[str, ProbeConfig]] = {}
        for key, config in dict(zip(keys, configs, strict=True)).items():  # each once
            known = self._read(key, config)
            if known is not None:
                found[key] = known
                self.report(known, True)
            else:
                running[self.pool_for(config).submit(figures_of, config)] = (key, config)
        for future in as_completed(running):
            key, config = running[future]
            found[key] = Prediction(config, **result_of(future))
            if found[key].problem is None:
                self._write(key, future.result())
            self.report(found[key], False)
        return [replace(found[key], config=config) for key, config in zip(keys, configs, strict=True)]

    def pool_for(self, config: ProbeConfig) -> ProcessPoolExecutor:
        """DeepSpeed leaves a process that cannot be used again. Others go on, and are faster each time."""
        is_deepspeed = config.launch.name.startswith("zero")
        if is_deepspeed not in self._pools:
            begin = {"initializer": begin_fresh, "max_tasks_per_child": 1} if is_deepspeed else {}
            self._pools[is_deepspeed] = process_pool(num_processes(), "forkserver", "planning.predictions", **begin)
        return self._pools[is_deepspeed]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, key: str, config: ProbeConfig) -> Prediction | None:
        try:
            return Prediction(config, **json.loads(self._path(key).read_text()))
        except (OSError, ValueError, TypeError):  # not there, or cut short
            return None

    def _write(self, key: str, figures: dict[str, Any]) -> None:
        try:
            write_json(self._path(key), figures)
        except OSError:  # a full disk, or no home: the next plan predicts it again
            pass


def result_of(future: Future) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that predicts was killed, most likely because RAM ran out: close other programs and start the "
            "plan again, it goes on where it was"
        ) from None


def figures_of(config: ProbeConfig) -> dict[str, Any]:
    """For a process of the pool."""
    quiet_libraries()
    try:
        check_model(config)
        predicted = predict(config)
    except UserError as error:
        return {"problem": str(error)}
    return {name: predicted[name] for name in FIGURES}


def num_processes() -> int:
    """As many as there are cores, and RAM for."""
    by_memory = int(psutil.virtual_memory().available // PROCESS_BYTES)
    return max(min(len(os.sched_getaffinity(0)), by_memory), 1)


def cache_folder() -> Path:
    """The user's own folder of caches, as the XDG base directory specification names it; without a home, one that goes
    with the next start of the computer."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        folder = Path(tempfile.gettempdir())
    return folder / "memory_probe"


def key_of(config: ProbeConfig) -> str:
    """A hash of all that the prediction depends on."""
    flags = {name: value for name, value in asdict(config).items() if name not in IRRELEVANT}
    parts = (flags, config.launch.deepspeed_config, model_state(config.model), code_state(), allocator_settings())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def model_state(model: str) -> list[Any]:
    """What tells one model of this name from another: its config, and in a folder its files' sizes and times."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file()) if Path(model).is_dir() else []
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [load_config(model).to_json_string(), states]


@cache
def code_state() -> list[str]:
    """A hash of the code that predicts, and the versions of Python and of the libraries."""
    content = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            content.update(file.read_bytes())
    return [content.hexdigest(), platform.python_version(), *map(version_of, PACKAGES)]


def version_of(package: str) -> str | None:
    """None: it is not installed, which not every prediction needs."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
