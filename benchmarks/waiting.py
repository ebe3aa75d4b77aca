"""How long train.py's steps wait for their batch, on the demo:

    python -m benchmarks.waiting    # no GPU; a minute for each number of workers

It trains with 0, 1, ... workers and times each call for the next batch. The first call starts the workers, and is
reported apart. Writes results/waiting.json; the last line on stdout is JSON.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from unittest.mock import patch

import train
from benchmarks.loader import PACKAGES
from benchmarks.rows import machine
from training.faults import Watch
from utils import check_minimum, flag, parse_config, run_script, write_json


@dataclass(kw_only=True)
class WaitingConfig:
    num_workers: int = flag(2, "from 0 up to this")
    max_steps: int = 60
    output: str = "results/waiting.json"

    def __post_init__(self) -> None:
        check_minimum(self, num_workers=0, max_steps=2)


def main(config: WaitingConfig) -> dict:
    runs = [measure(num_workers, config.max_steps) for num_workers in range(config.num_workers + 1)]
    for run in runs:
        print(f"{run['num_workers']} workers: steps wait {run['waiting_share']:.1%} of the time", flush=True)
    result = {"benchmark": "waiting", **asdict(config), **machine(*PACKAGES), "runs": runs}
    write_json(config.output, result)
    return result


def measure(num_workers: int, max_steps: int) -> dict:
    """Seconds in which a run on the demo takes its steps, and in which it waits for batches."""
    with tempfile.TemporaryDirectory() as folder, timed_batches() as (waits, steps):
        flags = (
            f"--output_dir {folder} --max_steps {max_steps} --eval_samples 0 --dataloader_num_workers {num_workers}"
        )
        train.main(parse_config(train.TrainConfig, flags.split()))
    return {
        "num_workers": num_workers,
        "first_wait_seconds": waits[0],
        "median_wait_seconds": median(waits[1:]),
        "longest_wait_seconds": max(waits[1:]),
        "median_step_seconds": median(steps),
        "waiting_share": sum(waits[1:]) / (sum(waits[1:]) + sum(steps)),
    }


@contextmanager
def timed_batches() -> Iterator[tuple[list[float], list[float]]]:
    """Seconds of each call for a batch, and of the step after it."""
    waits: list[float] = []
    steps: list[float] = []
    fetch = Watch.batches

    def timed(watch: Watch, loader: Iterable[dict]) -> Iterator[dict]:
        batches = fetch(watch, loader)
        while True:
            start = time.perf_counter()
            if (batch := next(batches, None)) is None:
                return
            waits.append(time.perf_counter() - start)
            start = time.perf_counter()
            yield batch
            steps.append(time.perf_counter() - start)

    with patch.object(Watch, "batches", timed):
        yield waits, steps


if __name__ == "__main__":
    run_script(main, WaitingConfig)
