"""The loader's workers: shared memory that is small or full, and a worker that is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_sharer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from forked_runs import Run, run
from torch.utils.data import DataLoader, Dataset

import data.loader
import data.sharing
from data.loader import largest_batch_bytes
from data.sharing import ignore_lost_reader, share, workers_that_fit
from data.worst_case import Row
from mgm.configuration_mgm import tiny
from models.loading import load_processor
from step import StepConfig
from training.faults import explain_death
from utils import UserError


ROOT = Path(__file__).parent.parent
FLAGS = "--eval_samples 0 --no_rehearse --per_device_train_batch_size 2 --dataset data/demo/train.json"


def test_the_largest_batch() -> None:
    """Four int64 values a token but where an image stands, and two pictures an image."""
    config = StepConfig(model="tiny", per_device_train_batch_size=3, mixed_precision="no")
    sizes = tiny().vision_config.image_size, tiny().vision_config_aux.image_size
    pictures_bytes = 3 * sum(3 * size * size * 4 for size in sizes)
    assert 0 < largest_batch_bytes(load_processor("tiny"), config, Row(100, 1)) - pictures_bytes <= 3 * 100 * 4 * 8


@pytest.mark.parametrize(("free_mib", "num_workers"), [(99, 2), (60, 2), (59, 1), (39, 0), (0, 0)])
def test_workers_that_fit(free_mib: int, num_workers: int, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    """Two batches for each worker and two more, of 5 MiB on each of two processes. Fewer workers are one line."""
    monkeypatch.setattr(data.sharing, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(data.sharing.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_mib * 2**20))
    assert workers_that_fit(2, 5 * 2**20, num_processes=2) == num_workers
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (num_workers < 2)
    assert all(
        "shared memory" in line and f"{free_mib}.00 MiB free" in line and "--shm-size" in line for line in lines
    )


def full(tensor: torch.Tensor) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_shared_memory_that_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may take what was free at the start: an error in the training process, which does not wait."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = DataLoader([torch.zeros(2)] * 4, collate_fn=lambda samples: share({"x": samples[0]}), num_workers=1)
    with pytest.raises(UserError, match="shared memory is full.*No space left.*--shm-size"):
        next(iter(loader))


@pytest.mark.slow
def test_small_shared_memory_for_real(tmp_path: Path) -> None:
    """1 MiB: the run goes on without workers and says so; --doctor says so too."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("only root may mount")
    flags = f"{FLAGS} --per_device_train_batch_size 64 --max_steps 2 --no_forecast --output_dir {tmp_path / 'out'}"
    commands = [f"{sys.executable} train.py {words}" for words in (flags, "--doctor --model data/tiny_mgm")]
    script = f"{mount} && {commands[0]} && {commands[1]}"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert "1.00 MiB free, 2 data workers may need" in done.stderr and "going on with 0" in done.stderr
    assert (tmp_path / "out/adapter_model.safetensors").exists(), done.stderr[-2000:]
    assert "MiB free shared memory" in done.stdout


class HandsOut(Dataset):
    """Each sample is an address, at which its worker hands out shared memory to who asks."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        self.kept = resource_sharer.DupFd(1)
        return self.kept._id[0]


@pytest.mark.parametrize("starts_with", [None, ignore_lost_reader])
def test_a_reader_that_hangs_up(starts_with: Callable[[int], None] | None, capfd: pytest.CaptureFixture) -> None:
    """As the training process does when another worker dies: no traceback from this one."""
    loader = DataLoader(
        HandsOut(), batch_size=None, num_workers=1, worker_init_fn=starts_with, persistent_workers=True
    )
    batches = iter(loader)
    address = next(batches)
    for _ in range(2):  # one after the other: the second is answered once the worker is done with the first
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(address)
            assert reader.recv(1, socket.MSG_PEEK)  # waits for a challenge, which is left unread
    del batches, loader
    assert ("ConnectionResetError" in capfd.readouterr().err) == (starts_with is None)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_worker(num_processes: int, tmp_path: Path) -> None:
    """As the host's out-of-memory killer does it: one line, exit code 1, the last step is kept, the run goes on."""
    flags = f"{FLAGS} --max_steps 2000 --save_steps 1000 --logging_steps 1 --output_dir {tmp_path / 'out'}"
    started = Run(flags, tmp_path, "single" if num_processes == 1 else "ddp", num_processes)
    wait_for(lambda: " 3/2000" in (tmp_path / "0.err").read_text() if (tmp_path / "0.err").exists() else False)
    workers = psutil.Process(started.processes[0].pid).children()
    os.kill(workers[0].pid, signal.SIGKILL)
    ended = started.wait(60)
    assert ended.code == 1 and f"a data worker (process {workers[0].pid}) was killed" in ended.error
    assert ".." not in ended.error
    assert "host ran out of memory" in ended.error and "Kept step " in ended.error
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    flags = flags.replace("--max_steps 2000", f"--max_steps {step + 1}")
    ended = run(f"{flags} --resume_from_checkpoint latest", tmp_path)
    assert ended.code == 2 and f"was 2000, now {step + 1}" in ended.error, "the checkpoint is read"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "(process 7) was killed, most likely"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "no more shared memory: give"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "(process 7, 8) was killed, most likely"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details", "died (exited unexpectedly with"),
        ("DataLoader worker (pid 7) is killed by signal: Aborted. ", "died (is killed by signal: Aborted)"),
    ],
)
def test_deaths_are_explained(message: str, words: str) -> None:
    """torch's own messages."""
    assert words in explain_death(message)
