"""What a run writes to the disk, predicted, against checkpoints that were written; a disk that is too small."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

import training.disk_room
from memory.config import ProbeConfig
from memory.disk import FP32_BYTES, MOMENTS, checkpoint_bytes, output_bytes
from memory.trace import trained_shapes
from step import OPTIMIZERS, build_model, build_optimizer
from training.checkpoint_files import write_checkpoint
from training.checkpoints import run_settings
from training.config import TrainConfig
from training.disk_room import count_saves, num_more_checkpoints, warn_of_little_room
from training.random_state import rng_state, rng_state_to_json
from training.training_state import TrainingState
from utils import MIB


TINY = "data/tiny_mgm"


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "num_processes"),
    [
        ({}, 1),
        ({"lora_r": 0}, 1),
        ({"optim": "sgd"}, 1),
        ({"use_dora": True, "lora_target_modules": ["all-linear"]}, 2),
        ({"lora_r": 1, "trainable_modules": ["multi_modal_projector"]}, 64),
    ],
)
def test_a_checkpoint_is_as_large_as_predicted(
    accelerator: Accelerator, flags: dict, num_processes: int, tmp_path: Path
) -> None:
    """Within 1 %, also where random numbers of many processes are most of it."""
    config = TrainConfig(model=TINY, **flags)
    model = build_model(config, is_deepspeed=False)
    optimizer = build_optimizer(model, config.optim, learning_rate=1e-3)
    scheduler = get_scheduler("constant", optimizer)
    state = TrainingState(accelerator, model, SimpleNamespace(optimizer=optimizer), scheduler)
    state.make_optimizer_state()
    content = {
        "position": {"global_step": 100, "epoch": 0, "update": 100},
        "settings": run_settings(config, data={"num_records": 100, "sha256": "0" * 16}, trained=state.shapes()),
        **state.values(),
        "log": {},
        "rng": [rng_state_to_json(rng_state())] * num_processes,
    }
    write_checkpoint(tmp_path, 100, content, state.tensors())
    predicted = checkpoint_bytes(
        trained_shapes(ProbeConfig(model=TINY, mode="predict", **flags)), config.optim, num_processes
    )
    assert predicted == pytest.approx(file_bytes(tmp_path / "checkpoint-100"), rel=0.01)


def test_every_optimizers_moments_are_known() -> None:
    """As many tensors of a parameter's size as it keeps after a step."""
    for name, optimizer_class in OPTIMIZERS.items():
        parameter = nn.Parameter(torch.zeros(7, 3))
        optimizer = optimizer_class([parameter], lr=1.0)
        parameter.grad = torch.ones(7, 3)
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert MOMENTS[name] == sum(value.shape == parameter.shape for value in state)
    assert MOMENTS.keys() == OPTIMIZERS.keys()


def test_large_models_by_hand() -> None:
    """A thousand million numbers: 12 bytes each in a checkpoint; in the output 4 or 2, and 2 of a frozen one."""
    billion = 10**9
    assert checkpoint_bytes({"w": [1000, 10**6]}, "adamw_torch") == pytest.approx(12 * billion, rel=1e-4)
    assert output_bytes(billion, 0, "bf16", is_deepspeed=False) == FP32_BYTES * billion
    assert output_bytes(billion, 2 * billion, "bf16", is_deepspeed=False) == 8 * billion
    assert output_bytes(billion, 2 * billion, "fp16", is_deepspeed=True) == 6 * billion


@pytest.mark.parametrize(
    ("updates", "save_steps", "expected"),
    [((0, 100), 50, 2), ((0, 101), 50, 3), ((50, 101), 50, 2), ((0, 10), 0, 0), ((100, 100), 50, 0), ((0, 3), 1, 3)],
)
def test_saves_that_are_to_come(updates: tuple[int, int], save_steps: int, expected: int) -> None:
    """After so many updates of so many."""
    assert count_saves(range(updates[0] + 1, updates[1] + 1), save_steps) == expected


@pytest.mark.parametrize(
    ("num_saves", "num_there", "limit", "expected"),
    [(9, 0, 2, 3), (2, 0, 2, 2), (9, 2, 2, 1), (9, 5, 2, 1), (9, 0, 0, 9), (9, 2, 0, 9), (0, 2, 2, 0)],
)
def test_checkpoints_that_are_there_at_a_time(num_saves: int, num_there: int, limit: int, expected: int) -> None:
    """One more than are kept, because the oldest goes when the new one is there."""
    assert num_more_checkpoints(num_saves, num_there, limit) == expected


@pytest.mark.parametrize(("free_mib", "is_told"), [(40, True), (41, False)])
def test_a_small_disk_is_told_before_the_first_step(
    free_mib: int,
    is_told: bool,
    accelerator: Accelerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Three checkpoints of 12.02 MiB and 4 MiB of weights: one line with the sizes and the remedies."""
    monkeypatch.setattr(training.disk_room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_mib * MIB))
    config = TrainConfig(model=TINY, output_dir=str(tmp_path / "not/there/yet"), save_steps=10)
    shapes = {"weight": [1024, 1024]}
    warn_of_little_room(accelerator, config, nn.Linear(1, 1), shapes, range(1, 101))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == is_told
    if is_told:
        assert "40.00 MiB free" in lines[0] and "3 x 12.02 MiB" in lines[0] and "4.00 MiB of weights" in lines[0]
        assert "--save_total_limit" in lines[0] and "--output_dir" in lines[0]
