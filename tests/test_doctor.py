"""train.py --doctor: what it says of this machine, and of machines that are not at hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mgm.configuration_mgm import PRESETS
from training.config import TrainConfig
from training.doctor import Facts, GpuFacts, findings, head_sizes, judge_data, judge_model
from utils import GIB


ROOT = Path(__file__).parent.parent
RTX4090 = GpuFacts("NVIDIA GeForce RTX 4090", (8, 9), 23 * GIB, 24 * GIB)
READY = Facts(
    python="/env/bin/python",
    accelerate="/env/bin/accelerate",
    packages={"torch": ("2.13.0", "2.13.0+cu130")},
    torch_cuda="13.0",
    torch_architectures=("sm_80", "sm_90"),
    driver_gpus=("NVIDIA GeForce RTX 4090",),
    gpus=(RTX4090,),
    cuda_home="/usr/local/cuda",
    toolkit="13.0",
    compiler="g++",
    flash_attn="2.8.3",
    head_sizes={"language model": 256, "vision tower": 64},
    free_host_bytes=32 * GIB,
    free_disk_bytes=100 * GIB,
    free_shared_bytes=16 * GIB,
)


def marks(facts: Facts) -> dict[str, str]:
    return {finding.what: finding.mark for finding in findings(facts)}


def test_a_machine_that_is_ready() -> None:
    """Nothing to remedy. On an RTX 4090 Gemma's heads of 256 can be trained by flash kernels, heads of 224 cannot."""
    assert set(marks(READY).values()) == {"ok"}
    [gemma] = [what for what in marks(READY) if "heads of 256" in what]
    assert "its flash kernel" in gemma and "flash-attn 2.8.3 can train them" in gemma
    narrower = replace(READY, head_sizes={"language model": 224})
    [what] = [what for what in marks(narrower) if "heads of 224" in what]
    assert "trains with its memory-efficient kernel" in what
    h100 = replace(narrower, gpus=(replace(RTX4090, name="H100", capability=(9, 0)),))
    assert any("heads of 224" in what and "its flash kernel" in what for what in marks(h100))


@pytest.mark.parametrize(
    ("changes", "mark", "words", "remedy"),
    [
        ({"accelerate": "/usr/bin/accelerate"}, "problem", "another Python's", "python -m accelerate"),
        ({"accelerate": None}, "warning", "no accelerate", "activate"),
        ({"packages": {"peft": ("0.21.2", "0.20.0")}}, "warning", "peft 0.20.0", "requirements.txt"),
        ({"packages": {"peft": ("0.21.2", None)}}, "warning", "peft missing", "requirements.txt"),
        ({"gpus": (), "torch_cuda": None}, "problem", "torch is a CPU build", "CUDA build"),
        ({"gpus": ()}, "problem", "cannot use it", "driver"),
        ({"toolkit": "12.4"}, "warning", "CUDA toolkit 12.4, but torch has 13.0", "CUDA_HOME"),
        ({"toolkit": None}, "warning", "has no bin/nvcc", "unset"),
        ({"compiler": None}, "warning", "no C++ compiler", "apt install g++"),
        ({"compiler": None, "gpus": (), "driver_gpus": ()}, "problem", "no C++ compiler", "single.yaml"),
        ({"flash_attn": "2.5.0"}, "warning", "flash-attn 2.5.0 cannot train them", "sdpa"),
        ({"gpus": (replace(RTX4090, free_bytes=10 * GIB),)}, "warning", "in use already", "nvidia-smi"),
        ({"torch_architectures": ("sm_90",)}, "problem", "no kernels for sm_89", "torch build"),
        ({"free_host_bytes": GIB}, "warning", "1.00 GiB free host memory", "zero3.yaml"),
        ({"free_disk_bytes": GIB}, "warning", "1.00 GiB free disk", "--output_dir"),
        ({"free_shared_bytes": GIB // 16}, "warning", "64.00 MiB free shared memory", "docker run --shm-size"),
    ],
)
def test_each_problem_has_its_remedy(changes: dict, mark: str, words: str, remedy: str) -> None:
    """One finding, of that mark, that names the thing and what to do."""
    found = [finding for finding in findings(replace(READY, **changes)) if words in finding.what]
    assert len(found) == 1 and found[0].mark == mark and remedy in found[0].remedy


def test_old_cards() -> None:
    """A T4 has neither bf16 nor flash kernels; that is no fault."""
    turing = replace(RTX4090, name="Tesla T4", capability=(7, 5))
    facts = replace(READY, gpus=(turing,), torch_architectures=("sm_75",))
    assert set(marks(facts).values()) == {"ok"}
    assert "no bf16 units: auto chooses fp16" in marks(facts)


def test_head_sizes() -> None:
    """Read from the model's config."""
    assert head_sizes(PRESETS["mgm-2b"]()) == {"language model": 256, "vision tower": 64}


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    """No GPU is no error, an output folder with something in it neither, and nothing is written."""
    (tmp_path / "file").touch()
    command = [sys.executable, "train.py", "--doctor", "--model", "mgm-2b", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (2 if result["status"] == "problem" else 0), done.stderr[-2000:]
    assert "free host memory" in done.stdout and "Python 3" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_preset_cannot_be_trained(tmp_path: Path) -> None:
    """It has a config alone: a warning says so; a folder has none."""
    assert [finding.mark for finding in judge_model("mgm-2b")] == ["warning"]
    assert judge_model("data/tiny_mgm") == []


def test_data(tmp_path):
    """Data sets that are named: how many records they have, or why they cannot be read."""
    held_out = tmp_path / "held_out.json"
    held_out.write_text(
        '[{"id": "1", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]}]'
    )
    found = judge_data(TrainConfig(dataset=str(tmp_path / "nope.json"), eval_dataset=str(held_out)))
    assert [finding.mark for finding in found] == ["problem", "ok"]
    assert "nope.json: no such file" in found[0].what and found[1].what == f"1 record in {held_out}"
    assert judge_data(TrainConfig()) == []
