"""The prediction in a process beside a run: what it is asked, what comes back, and that it harms nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from accelerate.utils import DistributedType

from data.worst_case import Row
from memory.config import ProbeConfig
from memory.probe import probe
from memory.strategy import Strategy
from step import StepConfig
from training.forecast import Forecast, launch_flags, quiet_environment


SINGLE = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)


def step_flags(**flags: object) -> dict:
    return StepConfig(**({"model": "tiny", "per_device_train_batch_size": 2, "lora_r": 4} | flags)).step_flags


@pytest.fixture
def stand_in_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start a script of these lines in the place of memory/probe.py."""

    def install(*lines: str) -> None:
        path = tmp_path / "probe.py"
        path.write_text("\n".join(lines))
        monkeypatch.setattr("training.forecast.PROBE", [str(path)])

    return install


@pytest.mark.slow
def test_it_is_what_the_probe_says_of_the_runs_batch():
    """Two rows of 60 tokens with two images, on this CPU, with the changes: as memory_probe.py has it."""
    flags = step_flags(gradient_checkpointing=False, mixed_precision="no")
    result = Forecast(flags, SINGLE, Row(60, 2), explain=True).wait(300)
    config = ProbeConfig(**flags | {"max_seq_len": 60, "images_per_sample": 2, "mode": "predict", "device": "cpu"})
    expected = probe(config)
    assert result["peak_allocated_bytes"] == expected["peak_allocated_bytes"]
    assert result["breakdown"] == expected["breakdown"]
    assert result["budget_bytes"] == pytest.approx(psutil.virtual_memory().total, rel=1e-6)
    assert {"gradient_checkpointing": True} in [change["flags"] for change in result["changes"]]
    assert result["fits"] and result["nearest"] is None


def test_a_failure_is_told_in_one_line():
    """A model that does not exist: no exception, and the probe's own words."""
    forecast = Forecast(step_flags() | {"model": "no-such-model"}, SINGLE)
    assert forecast.wait(120) is None
    assert forecast.problem.startswith("--model no-such-model") and "\n" not in forecast.problem


@pytest.mark.parametrize("lines", [["print('no JSON')"], ["import os", "os.kill(os.getpid(), 9)"], []])
def test_what_breaks_is_a_problem(stand_in_probe, lines):
    """Nonsense, a death, nothing at all: never an exception."""
    stand_in_probe(*lines)
    forecast = Forecast(step_flags(), SINGLE)
    assert forecast.wait(60) is None and forecast.problem


def test_it_is_never_waited_for(stand_in_probe):
    """poll returns at once; stop ends the process and what it has started, and leaves no file behind."""
    child = ["import subprocess, sys, time", "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"]
    stand_in_probe(*child, "time.sleep(99)")
    forecast = Forecast(step_flags(), SINGLE)
    process, folder = forecast._process, Path(forecast._folder.name)
    assert forecast.poll() is None and forecast.problem is None and process.nice() == 19
    while not process.children():
        assert process.is_running()
    started = process.children()
    forecast.stop()
    assert forecast.problem == "the run ended before it was computed" and not folder.exists()
    assert not process.is_running() and psutil.wait_procs(started, timeout=10)[1] == []
    forecast.stop()  # once more does nothing


def test_it_sees_neither_gpu_nor_launcher(monkeypatch, stand_in_probe):
    """The environment of a process of its own; the rest, like the hub's cache, is kept."""
    launchers = {"ACCELERATE_USE_DEEPSPEED", "RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    for name in (*launchers, "HF_HOME"):
        monkeypatch.setenv(name, "7")
    environment = quiet_environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and environment["HF_HOME"] == "7"
    assert not launchers & environment.keys()
    stand_in_probe("import json, os", "print(json.dumps(dict(os.environ)))")
    assert "ACCELERATE_USE_DEEPSPEED" not in Forecast(step_flags(), SINGLE).wait(60)


def test_the_runs_strategy_is_asked_for(monkeypatch, tmp_path):
    """DeepSpeed's JSON of the launch, DDP's processes, or nothing; read back as the probe reads it."""
    assert launch_flags(SINGLE, tmp_path) == {"strategy": "single"}
    ddp = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=3)
    assert launch_flags(ddp, tmp_path) == {"strategy": "ddp", "world_size": 3}
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    fsdp = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2)
    flags = launch_flags(fsdp, tmp_path)
    strategy = Strategy.from_config_file(flags["config_file"], flags["world_size"])
    assert (strategy.name, strategy.offload, strategy.world_size) == ("fsdp2", "param", 2)
    assert strategy.fsdp_config["fsdp_version"] == 2
    path = "accelerate_configs/deepspeed_zero3.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=2)
    flags = launch_flags(deepspeed, tmp_path)
    strategy = Strategy.from_config_file(flags["config_file"], flags["world_size"])
    assert (strategy.name, strategy.offload, strategy.world_size) == ("zero3", "param", 2)
    assert strategy.deepspeed_config == json.loads(Path(path).read_text())


def test_every_flag_of_a_step_is_handed_on(stand_in_probe):
    """Lists, nulls and truth values come back from the file as they were."""
    stand_in_probe("import sys, yaml, json", "print(json.dumps(yaml.safe_load(open(sys.argv[2]))))")
    flags = step_flags(gradient_checkpointing=False, trainable_modules=["patch_info_mining"], max_grad_norm=0.5)
    got = Forecast(flags, SINGLE, Row(70, 3)).wait(60)
    assert flags | {"max_seq_len": 70} == {name: got[name] for name in flags}
    assert got["images_per_sample"] == 3 and got["mode"] == "predict"


def test_step_flags_are_the_steps_alone():
    """TrainConfig's and the environment's have no place in them."""
    assert "output_dir" not in step_flags() and step_flags()["lora_r"] == 4
