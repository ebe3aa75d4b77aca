"""The committed table of a CPU: what it has to cover, how near the predictions are, and a few rows measured again."""

import json
from pathlib import Path
from statistics import median

import pytest

from benchmarks.cpu_matrix import ROWS, measure_row
from benchmarks.tables import CPU_MATRIX


TABLE = json.loads(CPU_MATRIX.read_text())["rows"]
SINGLE = [row for row in TABLE if "strategy" not in row["flags"]]
ZERO3 = [row for row in TABLE if "strategy" in row["flags"]]
AGAIN = [  # one of each kind
    {"model": "tiny", "lora_r": 16},
    {"model": "tiny", "mixed_precision": "bf16", "lora_r": 0},
    {"model": "mid", "gradient_checkpointing": False},
    {"model": "mid-language", "lora_r": 0, "images_per_sample": 0, "trainable_modules": ["model", "lm_head"]},
]


def test_every_row_is_there():
    """The rows of the command, each once."""
    flags = [row["flags"] for row in TABLE]
    assert len(SINGLE) >= 40 and len(flags) == len(ROWS) and all(row in flags for row in ROWS)


def test_errors_of_one_process():
    """Median 0.5 %, worst 2 %, never more than 1 % under; and the errors are those of the bytes beside them."""
    errors = [row["error"] for row in SINGLE]
    assert median(map(abs, errors)) <= 0.005 and max(map(abs, errors)) <= 0.02 and min(errors) >= -0.01
    for row in TABLE:
        assert row["error"] == row["predicted_bytes"] / row["measured_bytes"] - 1


def test_errors_of_offloading():
    """Device and host bytes of ZeRO-3 with everything offloaded, one process and two, within 5 %. (Of the two the
    tiny model is too small to be gathered: its weights are below the launch config's threshold.)"""
    assert {row["flags"].get("world_size", 1) for row in ZERO3} == {1, 2}
    assert max(abs(row["error"]) for row in ZERO3) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("flags", AGAIN, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))
def test_rows_measured_again(flags: dict, tmp_path: Path):
    """What was measured then, within 0.5 %, and the committed prediction, within 0.1 %."""
    row = next(row for row in TABLE if row["flags"] == flags)
    again = measure_row(flags, tmp_path)
    assert again["measured_bytes"] == pytest.approx(row["measured_bytes"], rel=5e-3)
    assert again["predicted_bytes"] == pytest.approx(row["predicted_bytes"], rel=1e-3)
