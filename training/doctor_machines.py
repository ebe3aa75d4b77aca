"""`train.py --doctor` started on several machines: do they reach each other, and are they alike?

Processes exchange their reports through the launcher's store, which needs no collective. So one that is missing can be
named. Collectives are tried last.
"""

import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from data.dataset import digest_records
from training.config import TrainConfig
from training.doctor import (
    Finding,
    findings_for,
    judge_data,
    ok,
    open_once,
    print_findings,
    problem,
    required_packages,
    warning,
)
from training.network import GLOO_INTERFACE, NCCL_INTERFACE, address_to, choose_interface
from utils import UserError, brief_error, markdown_table


ROOT = Path(__file__).parent.parent
JOIN_SECONDS = 120  # from the first process that has started Python to the last
REPORT_SECONDS = 1800  # then: a large data set is read
COLLECTIVE_SECONDS = 60
MAX_CLOCK_SECONDS = 1.0


@dataclass
class Report:
    """What a process says of itself, and on the main process what was found of it."""

    rank: int
    machine: str
    address: str | None  # on the way to the main process
    interfaces: dict[str, str | None]  # chosen by the user, or for gloo by us
    versions: dict[str, str | None]  # of Python and the packages
    code: str  # a hash
    data: str  # the same, of the data set's records
    findings: list[Finding] = field(default_factory=list)  # of the first process of a machine
    clock_seconds: float = 0.0  # ahead of the main process's
    collective: str | None = None  # why it failed

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"findings": [vars(finding) for finding in self.findings]})

    @classmethod
    def from_json(cls, text: str) -> "Report":
        values = json.loads(text)
        return cls(**values | {"findings": [Finding(**finding) for finding in values["findings"]]})


def run_doctor_on_machines(config: TrainConfig) -> dict[str, Any] | None:
    """Print a table of all machines and what is wrong; returns `status` and findings on the main process, else None.

    Raises:
        UserError: the main process cannot be reached.
    """
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    choose_interface()
    store = join(rank)
    store.set(f"here/{rank}", "")
    report = look_at_process(config, rank)
    if rank > 0:
        store.set(f"report/{rank}", report.to_json())
        store.get(f"ask/{rank}")
        store.set(f"time/{rank}", str(time.time()))
        store.set(f"collective/{rank}", try_collective(store, rank, num_processes) or "")
        return None
    others = range(1, num_processes)
    missing = [other for other in others if ask(store, f"here/{other}", JOIN_SECONDS) is None]
    reports = [report]
    for other in (other for other in others if other not in missing):
        if (text := ask(store, f"report/{other}", REPORT_SECONDS)) is None:
            missing.append(other)
        else:
            reports.append(Report.from_json(text))
            reports[-1].clock_seconds = clock_difference(store, other)
    if not missing:
        report.collective = try_collective(store, rank, num_processes)
        for each in reports[1:]:
            each.collective = ask(store, f"collective/{each.rank}", 2 * COLLECTIVE_SECONDS)
    print(as_table(reports))
    return print_findings(judge_machines(reports, missing))


def join(rank: int) -> distributed.Store:
    """The store in which processes find each other: the launcher's, or one that the main process opens."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=JOIN_SECONDS)
    try:
        store = distributed.TCPStore(
            host, port, is_master=rank == 0 and not is_launchers, timeout=timeout, wait_for_workers=False
        )
    except distributed.DistError as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()}: the main process cannot be reached at {host}, port {port} "
            f"({brief_error(error)}): is it started, and is the port open?"
        ) from None
    return distributed.PrefixStore("doctor", store)


def ask(store: distributed.Store, key: str, seconds: float) -> str | None:
    """The key's value; None if it is not there after this time."""
    try:
        store.wait([key], timedelta(seconds=seconds))
        return store.get(key).decode()
    except distributed.DistStoreError:
        return None


def clock_difference(store: distributed.Store, rank: int) -> float:
    """How many seconds that process's clock is ahead. Half of the time that the answer takes is the way back."""
    before = time.time()
    store.set(f"ask/{rank}", "")
    theirs = float(store.get(f"time/{rank}"))
    return theirs - (before + time.time()) / 2


def try_collective(store: distributed.Store, rank: int, num_processes: int) -> str | None:
    """Sum a number over all processes. Returns why it failed; None if it did not."""
    outcome = [f"no answer within {COLLECTIVE_SECONDS} s"]
    thread = threading.Thread(target=_sum_ones, args=(store, rank, num_processes, outcome), daemon=True)
    thread.start()
    thread.join(COLLECTIVE_SECONDS)
    return outcome[0] or None


def _sum_ones(store: distributed.Store, rank: int, num_processes: int, outcome: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=distributed.PrefixStore("collective", store),
            rank=rank,
            world_size=num_processes,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        ones = torch.ones(1, device=device)
        distributed.all_reduce(ones)
        outcome[0] = "" if ones.item() == num_processes else f"the sum is {ones.item()}, not {num_processes}"
    except RuntimeError as error:
        outcome[0] = brief_error(error)


def look_at_process(config: TrainConfig, rank: int) -> Report:
    found = []
    try:
        if os.environ["LOCAL_RANK"] == "0":
            found = findings_for(config)
    except UserError as error:
        found = [problem(str(error), "each machine needs the model, or a shared disk"), *judge_data(config)]
    return Report(
        rank=rank,
        machine=socket.gethostname(),
        address=address_to(os.environ["MASTER_ADDR"]),
        interfaces={name: os.environ.get(name) for name in (GLOO_INTERFACE, NCCL_INTERFACE)},
        versions={"python": platform.python_version()} | {n: has for n, (_, has) in required_packages().items()},
        code=code_hash(),
        data=data_hash(config),
        findings=[finding for finding in found if finding.mark != "ok"],
    )


def code_hash() -> str:
    """Of the repository's files that are imported."""
    files = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    content = hashlib.sha256()
    for file in sorted(file for file in files if file.is_relative_to(ROOT) and "site-packages" not in file.parts):
        content.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return content.hexdigest()[:8]


def data_hash(config: TrainConfig) -> str:
    """Of the records, as a resumed run compares them."""
    if config.dataset is None:
        return "the demo"
    try:
        dataset = open_once(config.dataset, config.image_folder, config.skips_bad_samples, config.follow_links)
    except UserError:  # judge_data says why
        return "cannot be read"
    digest = digest_records(dataset.records)
    return f"{digest['num_records']} records, {digest['sha256'][:8]}"


def as_table(reports: list[Report]) -> str:
    """A row for each machine."""
    rows = []
    for machine in dict.fromkeys(report.machine for report in reports):
        each = [report for report in reports if report.machine == machine]
        first, ranks = each[0], ", ".join(str(report.rank) for report in each)
        interfaces = (interface or "-" for interface in first.interfaces.values())
        clock = f"{first.clock_seconds:+.3f} s"
        rows.append(
            [machine, ranks, first.address, *interfaces, clock, first.versions["torch"], first.code, first.data]
        )
    header = ["machine", "ranks", "address", *reports[0].interfaces, "clock", "torch", "code", "data"]
    return markdown_table(header, rows)


def judge_machines(reports: list[Report], missing: list[int]) -> list[Finding]:
    main = reports[0]
    found = [
        problem(
            f"rank {rank} is missing: it has not reported in time",
            "look at its machine's output; all machines need the same number of machines and of processes",
        )
        for rank in missing
    ]
    for each in reports[1:]:
        found += judge_report(each, main)
    if failed := [report for report in reports if report.collective]:
        reasons = "; ".join(f"rank {report.rank} on {report.machine}: {report.collective}" for report in failed)
        remedy = f"open all ports between the machines; set {NCCL_INTERFACE} and {GLOO_INTERFACE} to what joins them"
        found.append(problem(f"a sum over all processes fails: {reasons}", remedy))
    found = found or [ok(f"{len(reports)} processes are alike and reach each other")]
    for report in reports:
        found += [Finding(each.mark, f"{report.machine}: {each.what}", each.remedy) for each in report.findings]
    return found


def judge_report(report: Report, main: Report) -> list[Finding]:
    """A process against the main one."""
    found, name = [], f"rank {report.rank} on {report.machine}"
    there = f"rank {main.rank} on {main.machine}"
    others = [key for key in main.versions | report.versions if main.versions.get(key) != report.versions.get(key)]
    if others:
        listed = ", ".join(f"{key} {report.versions.get(key)} ({there}: {main.versions.get(key)})" for key in others)
        found.append(problem(f"{name} has other versions: {listed}", "install the same requirements.txt everywhere"))
    if report.code != main.code:
        found.append(problem(f"{name} has other code than {there}", "check out the same commit on all machines"))
    if report.data != main.data:
        what = f"{name} has other data than {there}: {report.data}; there {main.data}"
        found.append(problem(what, "copy the same data to all machines, or use a shared disk"))
    if abs(report.clock_seconds) > MAX_CLOCK_SECONDS:
        what = f"{name}: the clock differs from {there}'s by {report.clock_seconds:+.1f} s"
        found.append(warning(what, "synchronize the clocks (NTP): times in logs cannot be compared"))
    return found
