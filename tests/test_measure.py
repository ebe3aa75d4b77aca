"""How a step is measured."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_records import tiny_config

import step
from memory.measure_cpu import measure_rank
from memory.measure_gpu import measure_this_process, on_gpus, refuse_gpu_in_use
from memory.strategy import Strategy
from utils import ALLOCATOR_VARIABLE, UserError


class Built(Exception):
    """The accelerator would be built now."""


@pytest.mark.parametrize(
    "measure_here",
    [
        measure_rank,
        measure_this_process,
    ],
    ids=["strategy", "gpu"],
)
def test_a_measurement_runs_two_micro_batches_an_update(measure_here, monkeypatch) -> None:
    """Of the 128 that a recipe accumulates, as a prediction does: the others find the same memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name in ("RANK", "LOCAL_RANK", ALLOCATOR_VARIABLE):  # what is measured in a process of its own sets them
        monkeypatch.setenv(name, "0")

    def build(mixed_precision: str, micro_batch_size: int, gradient_accumulation_steps: int, *_: object) -> None:
        raise Built(gradient_accumulation_steps)

    monkeypatch.setattr(step, "build_accelerator", build)
    for given, expected in ((1, 1), (2, 2), (128, 2)):
        config = tiny_config(gradient_accumulation_steps=given)
        with pytest.raises(Built, match=f"^{expected}$"):
            measure_here(config)
        assert config.gradient_accumulation_steps == given, "the flags are the caller's"


def test_more_processes_than_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--world_size 2: this machine has 1 GPU; predict"):
        on_gpus(Strategy("ddp", world_size=2), measure_this_process)


@pytest.mark.parametrize(("uuid", "is_refused"), [("used", True), ("free", False)])
def test_a_gpu_in_use(uuid: str, is_refused: bool, tmp_path: Path, monkeypatch) -> None:
    """Refused, unless the process is on another GPU of the host."""
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text('#!/bin/sh\n[ "$1" = --id=GPU-used ] && echo "7, 500 MiB"\ntrue\n')
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    with pytest.raises(UserError, match="in use by process 7") if is_refused else nullcontext():
        refuse_gpu_in_use()
