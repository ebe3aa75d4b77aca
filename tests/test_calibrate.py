"""--calibrate: sums by hand, an entry that Python reads, the refusal; the measuring itself where there is a GPU."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from memory.calibrate import calibrate, entry, host_constants, overheads
from memory.cards import GPUS, this_gpu
from memory.config import ProbeConfig
from memory.gpus import Family, Gpu, Speed
from memory.step_time import CONSTANTS, Constants, issue_seconds
from memory.work import Operation


ROOT = Path(__file__).parent.parent


def test_overheads_by_hand():
    """A device with 1000 in use, of which 600 are reserved and 300 the context: 100 are kernels; NCCL is what the
    second process has beyond that."""
    single = {"device_bytes": 1000, "peak_reserved_bytes": 600, "context_bytes": 300}
    parallel = {"device_bytes": 1250, "peak_reserved_bytes": 700, "context_bytes": 305}
    assert overheads(single, parallel) == {"context_bytes": 300, "kernels_bytes": 100, "nccl_bytes": 150}


def test_the_entry_is_python():
    """What is printed can be pasted: it makes the card that was measured."""
    result = {"gpu_name": "NVIDIA GeForce RTX 4090", "torch": "2.13.0", "cuda": "13.0", "capacity_bytes": 25 * 2**30}
    result |= {
        "capability": (8, 9),
        "context_bytes": 1,
        "kernels_bytes": 2,
        "cublas_workspace_bytes": 3,
        "nccl_bytes": 4,
        "block_shared_bytes": 5,
        "speed": asdict(Speed(1e12, 2e12, 3e12, 4e12, 5e-6, 6)),
        "constants": asdict(CONSTANTS),
    }
    lines = entry(result).splitlines()
    names = {"Family": Family, "Gpu": Gpu, "Speed": Speed, "Constants": Constants}
    exec("\n".join([*lines[:3], "CARDS = {", lines[3], "}", *lines[4:]]), names)
    family, speed = Family((8, 9), 1, 2, 3, 5), Speed(1e12, 2e12, 3e12, 4e12, 5e-6, 6)
    card = Gpu("NVIDIA GeForce RTX 4090, 25 GB", 25 * 2**30, family, speed, is_measured=True)
    assert names["CARDS"] == {"rtx4090": card}
    assert names["NCCL_BYTES"] == 4 and names["CONSTANTS"] == CONSTANTS


def test_the_hosts_constants():
    """With them the host needs as long as was measured, in both passes; Python's keep their proportions."""
    operations = [
        Operation("kernel", "mm", "forward", True, views=3, modules=2),
        Operation("kernel", "mm", "backward", True, modules=1),
        Operation("kernel", "mm", "backward", False, views=1),
        Operation("kernel", "mm", "backward", False),
    ]
    found = host_constants(operations, {"forward": 2e-4, "backward": 5e-4, "step": 1.0})
    assert issue_seconds(operations, "forward", found) == pytest.approx(2e-4)
    assert issue_seconds(operations, "backward", found) == pytest.approx(5e-4)
    assert found.view_seconds / found.python_seconds == pytest.approx(
        CONSTANTS.view_seconds / CONSTANTS.python_seconds
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    """One line, exit code 2."""
    done = subprocess.run([sys.executable, "memory_probe.py", "--calibrate"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == "error: --calibrate: this machine has no GPU to measure"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_the_table_says_of_this_gpu():
    """Within 64 MiB of the table's entry, where it was measured on this card; every figure above zero."""
    result = calibrate(ProbeConfig(model="tiny", max_seq_len=64, mode="measure"))
    assert min(result[key] for key in ("context_bytes", "kernels_bytes", "nccl_bytes", "cublas_workspace_bytes")) > 0
    gpu = GPUS[this_gpu()]
    if gpu.is_measured:
        assert result["context_bytes"] == pytest.approx(gpu.family.context_bytes, abs=64 * 2**20)
        for name in ("matmul_flops", "memory_bytes_per_second"):
            assert result["speed"][name] == pytest.approx(getattr(gpu.speed, name), rel=0.2)
