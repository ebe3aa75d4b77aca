"""What is predicted is what a GPU takes, of MGM-2B at its real size: `memory_probe.py --mode both` where the GPU is.

Each runs as a command: nothing may hold the GPU beside it, this process neither (conftest.py puts these tests first).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ZERO3 = "--config_file accelerate_configs/zero3.yaml"
ALLOCATED_ERROR = 0.001


def probe(flags: str) -> dict:
    assert not torch.cuda.is_initialized(), "this process would be taken for another user of the GPU"
    command = [sys.executable, "memory_probe.py", "--mode", "both", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 3), done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("flags", "device_error"),
    [
        ("", 0.01),
        ("--max_seq_len 4096 --lora_target_modules all-linear", 0.01),
        ("--no_gradient_checkpointing --max_seq_len 1024", 0.01),
        ("--per_device_train_batch_size 2 --max_seq_len 1024 --packing", 0.01),
        ("--per_device_eval_batch_size 8", 0.01),
        (f"{ZERO3} --max_seq_len 1024", 0.03),
    ],
)
def test_prediction_is_measured(flags: str, device_error: float) -> None:
    """Allocated, reserved and the device's memory, and each phase of the run."""
    found = probe(flags)
    measured = found["measured"]
    phases = {name: f"{found['phases'][name] / peak - 1:+.4%}" for name, peak in measured["phases"].items()}
    device = found["device_bytes"] / measured["device_bytes"] - 1
    reserved = found["peak_reserved_bytes"] / measured["peak_reserved_bytes"] - 1
    print(f"{flags}: {found['error']:+.4%}, reserved {reserved:+.3%}, device {device:+.3%}, phases {phases}")
    assert measured["oom"] is None
    assert abs(found["error"]) < ALLOCATED_ERROR
    assert abs(device) < device_error
    evaluation = found["phases"]["evaluate"] / measured["phases"]["evaluate"] - 1
    assert abs(evaluation) < ALLOCATED_ERROR
