"""Measure on all GPUs of a machine at once what other commands measure one after the other:

    python -m benchmarks.all_gpus --minutes 8                    # needs GPUs of 80 GB
    python -m benchmarks.all_gpus --jobs tests plans sweep --minutes 8

Each GPU takes the next job: a row that is missing in results/gpu/, or a share of the GPU tests. What is done when the
minutes are over is kept, and the next start goes on with the rest. A row is measured as by its own command
(benchmarks/gpu_matrix.py, step_time.py, plans.py); the host is shared, so seconds are those of a busy host.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import gpu_matrix, plans, step_time
from benchmarks.gpu_matrix import MatrixConfig
from benchmarks.gpu_tests import counts, head
from benchmarks.plan_tables import PLANS
from benchmarks.rows import ROOT, Rows, gpu_machine, gpu_of
from benchmarks.tables import GPU_FAMILIES, GPU_MATRIX, GPU_TESTS, write_tables
from child_processes import process_pool
from utils import UserError, check_choice, check_minimum, flag, quiet_libraries, run_script, write_json


STEP_TIME = GPU_MATRIX.with_name("step_time.json")


@dataclass
class Job:
    """`keep` is given what `function` returns, in the process that keeps the results."""

    name: str
    function: Callable[..., Any]
    arguments: tuple
    keep: Callable[[Any], None]


@dataclass(kw_only=True)
class AllGpusConfig:
    jobs: list[str] = field(default_factory=lambda: list(JOBS), metadata={"help": "which, in their order"})
    minutes: float = flag(8.0, "after which what is under way is cut off")
    commit: str | None = flag(None, "the commit under test; default: git's HEAD")

    def __post_init__(self) -> None:
        for name in self.jobs:
            check_choice("jobs", name, tuple(JOBS))
        check_minimum(self, minutes=0)


def main(config: AllGpusConfig) -> dict[str, Any]:
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise UserError("python -m benchmarks.all_gpus: this machine has no GPU")
    jobs = [job for name in config.jobs for job in JOBS[name](config, num_gpus)]
    num_left = run_jobs(jobs, num_gpus, time.monotonic() + 60 * config.minutes)
    write_tables()
    return {"done": len(jobs) - num_left, "left": num_left}


def run_jobs(jobs: list[Job], num_gpus: int, end: float) -> int:
    """Run them, a GPU each, until `end` (time.monotonic's). Returns how many have not been done."""
    waiting, running = iter(jobs), dict[Future, tuple[int, Job, float]]()
    num_done = 0
    with ExitStack() as stack:
        pools = [stack.enter_context(pool_of(gpu)) for gpu in visible_gpus(num_gpus)]

        def start(gpu: int) -> None:
            if (job := next(waiting, None)) is not None:
                running[pools[gpu].submit(job.function, *job.arguments)] = (gpu, job, time.monotonic())

        for gpu in range(num_gpus):
            start(gpu)
        while running and (left := end - time.monotonic()) > 0:
            for future in wait(running, left, FIRST_COMPLETED).done:
                gpu, job, since = running.pop(future)
                if (error := future.exception()) is None:
                    job.keep(future.result())
                    num_done += 1
                result = "done" if error is None else f"{type(error).__name__}: {error}"
                print(f"GPU {gpu}, {time.monotonic() - since:.0f} s, {job.name}: {result}", flush=True)
                start(gpu)
        for process in active_children() if running else ():
            process.kill()
    return len(jobs) - num_done


def visible_gpus(num_gpus: int) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(num_gpus)]


def pool_of(gpu: str) -> ProcessPoolExecutor:
    """A process that sees one GPU from its start: what it imports first may already ask for GPUs."""
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": gpu}):
        pool = process_pool(initializer=quiet_libraries)
        pool.submit(os.getpid).result()  # it is started by its first task
    return pool


def matrix_jobs(config: AllGpusConfig, num_gpus: int, families: bool = False) -> Iterator[Job]:
    path, wanted = (GPU_FAMILIES, gpu_matrix.FAMILY_ROWS) if families else (GPU_MATRIX, gpu_matrix.ROWS)
    rows = rows_of(path)
    for flags in rows.missing(wanted):
        probed = gpu_matrix.row_config(MatrixConfig(mode="measure"), gpu_of(rows.result), flags)
        yield row_job(rows, flags, gpu_matrix.measure_row, probed)


def family_jobs(config: AllGpusConfig, num_gpus: int) -> Iterator[Job]:
    return matrix_jobs(config, num_gpus, families=True)


def step_time_jobs(config: AllGpusConfig, num_gpus: int) -> Iterator[Job]:
    rows = rows_of(STEP_TIME)
    missing = rows.missing(row["flags"] for row in step_time.ROWS)
    for row in (row for row in step_time.ROWS if row["flags"] in missing):
        probed = step_time.row_config("measure", gpu_of(rows.result), row["flags"])
        yield row_job(rows, row["flags"], step_time.measure_row, probed, fitted=row["fitted"])


def plan_jobs(config: AllGpusConfig, num_gpus: int) -> Iterator[Job]:
    """The chosen steps. `--mode plan` of benchmarks/plans.py has made the plans."""
    rows = plan_rows()
    for plan in (plan for plan in rows.result["plans"] if "measured" not in plan):
        probed = step_time.row_config("measure", rows.result["gpu"], plan["flags"] | plan["chosen"])

        def keep(measured: dict[str, Any], plan: dict[str, Any] = plan) -> None:
            plan["measured"] = measured
            rows.write()

        yield Job(f"plan {plan['flags']}", plans.measured_plan, (probed,), keep)


def sweep_jobs(config: AllGpusConfig, num_gpus: int) -> Iterator[Job]:
    rows = plan_rows()
    for flags in rows.missing(plans.SWEEP, "sweep"):
        probed = step_time.row_config("measure", rows.result["gpu"], {"model": plans.SWEPT["model"]} | flags)
        yield row_job(rows, flags, step_time.measure_row, probed, name="sweep")


def test_jobs(config: AllGpusConfig, num_gpus: int) -> Iterator[Job]:
    """A share of the tests for each GPU. The record is written when all shares are done."""
    commit, found = config.commit or head(), []

    def keep(counted: dict[str, Any]) -> None:
        found.append(counted)
        if len(found) == num_gpus:
            write_json(GPU_TESTS, gpu_machine() | {"num_gpus": 1, "commit": commit} | added(found))

    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True
    )
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if not tests:
        raise UserError(f"pytest -m gpu finds no test: {listed.stdout.strip()[-200:]}")
    for share in range(num_gpus):
        yield Job(f"tests {share + 1} of {num_gpus}", run_tests, (tests[share::num_gpus],), keep)


def run_tests(tests: list[str]) -> dict[str, Any]:
    """Their counts. In a process that sees one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        return counts(report)


def added(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers are summed, names are put together."""
    return {name: sum((each[name] for each in found), type(found[0][name])()) for name in found[0]}


@cache
def plan_rows() -> Rows:
    """One for plans and sweep, which stand in one file."""
    rows = Rows(PLANS, {"version": 1})
    rows.result["machine"] = gpu_machine()
    return rows


def rows_of(path: Path) -> Rows:
    """A file's rows; those of another card are measured anew."""
    is_others = path.exists() and json.loads(path.read_text())["machine"]["gpu"] != gpu_machine()["gpu"]
    return Rows(path, {"version": 1}, overwrite=is_others, machine=gpu_machine())


def row_job(
    rows: Rows, flags: dict[str, Any], function: Callable, probed: Any, name: str = "rows", **more: Any
) -> Job:
    def keep(measured: dict[str, Any]) -> None:
        rows.add(more | {"flags": flags, "measured": measured}, name)

    return Job(f"{rows.path.stem} {flags}", function, (probed,), keep)


JOBS: dict[str, Callable[[AllGpusConfig, int], Iterator[Job]]] = {
    "tests": test_jobs,
    "plans": plan_jobs,
    "sweep": sweep_jobs,
    "families": family_jobs,
    "matrix": matrix_jobs,
    "step_time": step_time_jobs,
}


if __name__ == "__main__":
    run_script(main, AllGpusConfig)
