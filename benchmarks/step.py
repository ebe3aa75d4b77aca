"""Time and memory of a LoRA step by train.py, by transformers' Trainer with PEFT and by TRL's SFTTrainer, the others
plain and with Liger's kernels:

    pip install -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 python -m benchmarks.step    # no GPU; ten minutes of one core
    python -m benchmarks.step --minutes 8          # on a GPU of 80 GB, in bf16; adds the settings that are missing
    python -m benchmarks.step --settings gemma-2b:1x1024 mgm-2b:1x2048:zero3

A setting is model:ROWSxTOKENS, with and without checkpointing; `:nf4` and `:zero3` (all offloaded) are train.py's own,
with checkpointing. All variants take the same random weights, LoRA, AdamW and rows, of which the last part has labels.
Each has a process of its own and, while it runs, the GPU to itself. Its first two steps give the peak; one that
disagrees with transformers' Trainer on a loss or a gradient norm is left out. Then variants take turns, backwards in
every other round. MGM-2B, which no other trainer has, is measured against its floor: the operations that its step
needs, at the rate of one large matrix product. Writes results/step.json or results/gpu/step.json.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, Rows, RowsConfig, machine
from benchmarks.step_models import MODELS, OURS_ALONE, Setting, write_model
from benchmarks.step_ours import WAYS
from benchmarks.step_peers import import_trainer, peers
from benchmarks.step_results import OURS, compare, disagreements, flags_of, row_of
from benchmarks.step_variant import attempt, begin, build, take_turn, watch_steps
from benchmarks.step_watch import Step, free_memory, matmul_flops_per_second, used_bytes
from child_processes import process_pool
from models.config import MIXED_PRECISIONS
from utils import UserError, check_choice, check_device, check_minimum, flag, run_script


PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel")
LARGE_ROWS_STEPS = 2  # in each round, of a batch of several rows
CPU_SETTINGS = ["small:1x1024"]
GPU_SETTINGS = [
    *(f"gemma-2b:{size}" for size in ("1x1024", "1x2048", "4x2048")),
    *(f"qwen3-vl-2b:{size}" for size in ("1x1024", "1x2048")),
    *(f"mgm-2b:{size}" for size in ("1x2048", "4x2048", "1x2048:nf4", "1x2048:zero3")),
]


@dataclass(kw_only=True)
class StepBenchmarkConfig(RowsConfig):
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda | cpu")
    settings: list[str] = field(default_factory=list, metadata={"help": "model:ROWSxTOKENS[:nf4 | :zero3] ..."})
    rounds: int | None = flag(None, "turns of each variant; default: 5 on a CPU, 3 on a GPU")
    steps: int | None = flag(None, "in each turn; default: 1 on a CPU, 5 on a GPU, 2 with several rows")
    label_share: float = flag(0.3, "of the tokens")
    minutes: float | None = flag(None, "begin no setting after so many")
    output: str | None = flag(None, "default: results/step.json, on a GPU results/gpu/step.json")

    def __post_init__(self) -> None:
        check_device(self.device)
        is_gpu = self.device == "cuda"
        self.settings = self.settings or (GPU_SETTINGS if is_gpu else CPU_SETTINGS)
        self.rounds = self.rounds or (3 if is_gpu else 5)
        self.steps = self.steps or (5 if is_gpu else 1)
        self.output = self.output or str(RESULTS / ("gpu/step.json" if is_gpu else "step.json"))
        check_minimum(self, rounds=1, steps=1, minutes=0)
        if not 0 < self.label_share <= 1:
            raise UserError(f"--label_share {self.label_share}: it must be above 0, and 1 at most")
        for text in self.settings:
            parse_setting(text)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the computation. The trained parameters are in fp32."""
        return MIXED_PRECISIONS["bf16" if self.device == "cuda" else "no"]


def parse_setting(text: str) -> list[Setting]:
    """The settings that a word of --settings stands for. Raises UserError."""
    model, size, *way = text.split(":")[:3] if text.count(":") in (1, 2) else ("", "")
    rows, _, num_tokens = size.partition("x")
    if not (rows.isdecimal() and num_tokens.isdecimal() and int(rows) and int(num_tokens) > 1):
        raise UserError(f"--settings {text}: write model:ROWSxTOKENS, such as gemma-2b:1x2048")
    check_choice("settings", model, tuple(MODELS))
    check_choice("settings", "".join(way), WAYS)
    if way and model not in OURS_ALONE:
        raise UserError(f"--settings {text}: {way[0]} is measured for {', '.join(OURS_ALONE)} alone")
    modes = (True,) if way else (True, False)
    return [Setting(model, int(rows), int(num_tokens), mode, "".join(way)) for mode in modes]


def main(config: StepBenchmarkConfig) -> dict[str, Any]:
    """Team by team. All processes start at once, so that their imports overlap."""
    end = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    if config.device == "cpu":
        print("Liger's kernels need a GPU: the other trainers run without them", flush=True)
    fixed = {"version": 2, "device": config.device, "dtype": str(config.dtype).removeprefix("torch.")}
    fixed |= {"label_share": config.label_share}
    rows = Rows(Path(config.output), fixed, config.overwrite, benchmark="step", **about(config))
    teams: dict[tuple[str, int, bool, str], list[Setting]] = {}
    for setting in dict.fromkeys(setting for text in config.settings for setting in parse_setting(text)):
        if rows.missing([flags_of(setting, kind) for kind in kinds_of(config, setting)]):
            teams.setdefault(setting.team, []).append(setting)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pools = {
            team: {kind: stack.enter_context(process_pool()) for kind in kinds_of(config, settings[0])}
            for team, settings in teams.items()
        }
        for kind, pool in [each for team in pools.values() for each in team.items()]:
            pool.submit(import_trainer, kind)
        for team, settings in teams.items():
            measure_team(config, settings, Team(config, folder, team, pools[team]), rows, end)
    return {"rows": len(rows.result["rows"]), "ratios": rows.result.get("ratios", []), "output": config.output}


def kinds_of(config: StepBenchmarkConfig, setting: Setting) -> tuple[str, ...]:
    return (OURS,) if setting.model in OURS_ALONE else (OURS, *peers(config.device))


def about(config: StepBenchmarkConfig) -> dict[str, Any]:
    """The machine that figures hold for."""
    found = machine(*PACKAGES)
    if config.device == "cpu":
        found["machine"] = f"{os.cpu_count()} cores, PyTorch on {torch.get_num_threads()}"
    return found


class Team:
    """The variants of one model, with or without checkpointing: a process each."""

    def __init__(
        self,
        config: StepBenchmarkConfig,
        folder: str,
        team: tuple[str, int, bool, str],
        pools: dict[str, ProcessPoolExecutor],
    ) -> None:
        self.config, self.pools = config, pools
        self.model, self.rows, self.gradient_checkpointing, self.way = team
        self.folder = Path(folder) / self.model
        # What a process has of the GPU beside PyTorch's memory: its context and its kernels.
        self.context_bytes = dict.fromkeys(pools, 0)
        self.failed: dict[str, str] = {}

    def start(self, num_tokens: int) -> float:
        """Build the variants, for rows of so many tokens. Returns the matrix rate."""
        device, dtype = self.config.device, self.config.dtype
        if self.model not in OURS_ALONE and not self.folder.exists():
            write_model(self.model, str(self.folder), device, dtype)
        rate = matmul_flops_per_second(device, dtype)
        free_memory()
        mode = self.gradient_checkpointing, self.way, self.rows, num_tokens
        for kind in self.pools:
            self.call(kind, build, device, self.model_name, kind, *mode, self.parks)
        return rate

    @property
    def model_name(self) -> str:
        return self.model if self.model in OURS_ALONE else str(self.folder)

    @property
    def parks(self) -> bool:
        return self.config.device == "cuda" and len(self.pools) > 1

    def call(self, kind: str, function: Callable, *arguments: Any) -> dict[str, Any] | None:
        """What `function` found in the variant's process, its GPU memory added. None: it failed, now or before."""
        if kind in self.failed:
            return None
        before = used_bytes()
        try:
            found = self.pools[kind].submit(attempt, function, *arguments).result()
        except BrokenProcessPool:
            found = {"failed": "its process died", "memory": {"rise_bytes": 0, "peak_reserved_bytes": 0}}
        memory = found.pop("memory")
        if function is not watch_steps:  # the profiler's own memory is no part of a step's
            self.context_bytes[kind] += used_bytes() - before - memory["rise_bytes"]
        if "failed" in found:
            self.failed[kind] = found["failed"]
            print(f"{kind}: {found['failed']}", flush=True)
            return None
        return found | {"reserved_bytes": memory["peak_reserved_bytes"], "context_bytes": self.context_bytes[kind]}

    def stop(self) -> None:
        for pool in self.pools.values():
            pool.shutdown()


def measure_team(config: StepBenchmarkConfig, settings: list[Setting], team: Team, rows: Rows, end: float) -> None:
    """Settings that the time (time.monotonic's) is left for."""
    rate = None
    for setting in settings:
        if time.monotonic() > end:
            print(f"no time left for {setting}", flush=True)
            continue
        if rate is None:
            rate = team.start(max(each.num_tokens for each in settings))
            built = dict(team.failed)
        team.failed = dict(built)  # what runs out of memory may still run in another setting
        found = measure_setting(config, setting, team)
        rows.result["rows"] = [row for row in rows.result["rows"] if row["flags"] | asdict(setting) != row["flags"]]
        for kind in team.pools:
            row = row_of(setting, found[kind], rate) if kind in found else {"failed": team.failed[kind]}
            rows.add({"flags": flags_of(setting, kind)} | row)
        compare(rows.result)
        rows.write()
    team.stop()


def measure_setting(config: StepBenchmarkConfig, setting: Setting, team: Team) -> dict[str, dict[str, Any]]:
    """By kind: what `begin` found, and the steps of all rounds. A kind that failed is in `team.failed` instead."""
    first = {kind: team.call(kind, begin, config.device, config.label_share, setting) for kind in team.pools}
    found = {kind: values for kind, values in first.items() if values is not None}
    team.failed |= disagreements({kind: values["first_steps"] for kind, values in found.items()})
    for kind in found:
        found[kind] = (team.call(kind, watch_steps) or {}) | found[kind]
    steps: dict[str, list[Step]] = {kind: [] for kind in found}
    num_steps = config.steps if setting.rows == 1 else min(config.steps, LARGE_ROWS_STEPS)
    for number in range(config.rounds):
        for kind in steps if number % 2 == 0 else reversed(steps):
            taken = team.call(kind, take_turn, num_steps)
            steps[kind] += taken["steps"] if taken else []
    return {kind: values | {"steps": steps[kind]} for kind, values in found.items() if kind not in team.failed}


if __name__ == "__main__":
    run_script(main, StepBenchmarkConfig)
