"""memory_probe.py as users start it: the keys of a result, the verdict and its exit code, what cannot be."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from memory.allocator import replay_events
from memory.cards import GPUS
from memory.config import ProbeConfig
from memory.disk import RANDOM_STATE_BYTES
from memory.host import WORKER_BYTES
from memory.predict import summarize, trace_step
from memory.probe import probe
from memory.report import report
from memory_probe import run_probe
from step import StepConfig
from train import TrainConfig
from utils import GIB, FlagParser, UserError, size


ROOT = Path(__file__).parent.parent
DDP = str(ROOT / "accelerate_configs/ddp.yaml")
KEYS = "mode model config peak_allocated_bytes breakdown phases largest_tensors peak_reserved_bytes device_bytes"
KEYS += " host_bytes budget_bytes fits seconds notes step_seconds tokens_per_second checkpoint_bytes"


def tiny_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(**({"model": "tiny", "max_seq_len": 48, "lora_r": 4, "mode": "predict"} | flags))


def start(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "memory_probe.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def predicted() -> dict:
    return probe(tiny_config())


def test_the_keys_of_a_prediction(predicted):
    """Every key, the categories adding up to the peak, the phases' largest being it, ten tensors, largest first."""
    assert set(predicted) == set(KEYS.split())
    assert sum(predicted["breakdown"].values()) == predicted["peak_allocated_bytes"]
    assert max(predicted["phases"].values()) == predicted["peak_allocated_bytes"]
    assert set(predicted["phases"]) == {"load", "forward", "backward", "step", "save", "evaluate"}
    sizes = [tensor["bytes"] for tensor in predicted["largest_tensors"]]
    assert len(sizes) == 10 and sizes == sorted(sizes, reverse=True)
    assert {"bytes", "shape", "dtype", "module", "op"} <= predicted["largest_tensors"][0].keys()
    json.dumps(predicted)


def test_a_tensor_without_a_module_is_named_by_its_category(predicted):
    """ZeRO-3 gathers weights outside of any module."""
    tensor = predicted["largest_tensors"][0] | {"module": "", "category": "weights"}
    lines = report(predicted | {"largest_tensors": [tensor]}).splitlines()
    assert any(line.endswith(", frozen weights") for line in lines)


def test_shared_flags_have_one_default_and_one_help():
    """A prediction without flags is of a run without flags, but for the model: the run's is the tiny one."""

    def described(config_class: type) -> dict[str, tuple[Any, Any]]:
        parser = FlagParser(config_class)
        return {f.name: (parser.get_default(f.name), f.metadata.get("help")) for f in fields(config_class)}

    probed, trained = described(ProbeConfig), described(TrainConfig)
    shared = probed.keys() & trained.keys()
    assert shared >= {f.name for f in fields(StepConfig)}
    assert probed["model"] == ("mgm-2b", trained["model"][1])
    assert {name for name in shared if probed[name] != trained[name]} == {"model"}


@pytest.mark.parametrize(
    ("given", "expected"), [({"world_size": 1}, 1), ({"world_size": 3}, 3), ({}, 8), ({"config_file": None}, 1)]
)
def test_a_number_of_processes_that_is_given_wins(tmp_path, given, expected):
    """Over the launch config's, 1 too; and the config has the number that was taken."""
    (tmp_path / "launch.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n")
    assert tiny_config(**{"config_file": str(tmp_path / "launch.yaml")} | given).world_size == expected


@pytest.mark.parametrize(
    ("settings", "expected"), [(None, True), ("expandable_segments:True", True), ("expandable_segments:False", False)]
)
def test_the_allocators_settings_are_the_runs(settings, expected, monkeypatch):
    """Called from Python the prediction assumes what run_script would set; what the user has set counts."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if settings is not None:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    seen = []

    def replay(events: Any, expandable_segments: bool, **others: Any) -> Any:
        seen.append(expandable_segments)
        return replay_events(events, expandable_segments=expandable_segments, **others)

    monkeypatch.setattr("memory.predict.replay_events", replay)
    probe(tiny_config())
    assert seen == [expected]


def test_host_memory_counts_the_runs_workers(predicted):
    """A worker more, its memory and two batches more."""
    record = trace_step(tiny_config())
    batch = sum(nbytes for nbytes, a in record.device.events if nbytes > 0 and a.category == "batch")
    for num_workers in (0, 1, 5):
        host_bytes = summarize(record, tiny_config(dataloader_num_workers=num_workers))["host_bytes"]
        assert host_bytes - predicted["host_bytes"] == (num_workers - 2) * (WORKER_BYTES + 2 * batch)


def test_what_the_device_needs(predicted):
    """By hand: whole segments of 2 MiB, and the context and kernels of an RTX 4090, the default card."""
    family = GPUS["rtx4090"].family
    assert predicted["peak_reserved_bytes"] % 2**21 == 0
    assert predicted["peak_reserved_bytes"] >= predicted["peak_allocated_bytes"]
    overhead = family.context_bytes + family.kernels_bytes
    assert predicted["device_bytes"] == predicted["peak_reserved_bytes"] + overhead
    assert predicted["budget_bytes"] == int(23.63 * GIB) and predicted["fits"]


def test_equal_seeds_and_other_seeds_predict_the_same(predicted):
    """Memory does not depend on what is drawn."""
    again = probe(tiny_config(seed=7))
    assert again["breakdown"] == predicted["breakdown"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["max_seq_len", "per_device_train_batch_size", "lora_r"])
def test_more_takes_more(flag):
    """Longer rows, larger batches and higher ranks never need less."""
    values = {"max_seq_len": (48, 96, 192), "per_device_train_batch_size": (2, 4, 8), "lora_r": (2, 8, 32)}[flag]
    peaks = [probe(tiny_config(**{flag: value}))["peak_allocated_bytes"] for value in values]
    assert peaks == sorted(set(peaks))


def test_the_time_is_said_to_be_estimated(predicted):
    """One line. A prediction for a CPU knows no time, and says nothing of it."""
    rate = 48 / predicted["step_seconds"]
    assert predicted["tokens_per_second"] == pytest.approx(rate)
    line = f"  an update, estimated: {1000 * predicted['step_seconds']:.0f} ms, {rate:,.0f} tokens a second"
    assert line in report(predicted).splitlines()
    on_cpu = probe(tiny_config(device="cpu"))
    assert on_cpu["step_seconds"] is on_cpu["tokens_per_second"] is None
    assert "estimated" not in report(on_cpu)


def test_a_checkpoint_is_the_same_under_every_strategy(predicted):
    """But for the random numbers of each process. One line says how large it is."""
    line = f"  a checkpoint on the disk    {size(predicted['checkpoint_bytes']):>12}"
    assert line in report(predicted).splitlines()
    several = probe(tiny_config(strategy="ddp", world_size=4))
    assert several["checkpoint_bytes"] - predicted["checkpoint_bytes"] == 3 * RANDOM_STATE_BYTES


@pytest.mark.slow
def test_both_on_a_cpu():
    """The same step predicted and run: less than 0.1 % between them."""
    result = probe(tiny_config(mode="both", device="cpu"))
    assert result["predicted_peak_allocated_bytes"] == result["peak_allocated_bytes"]
    assert abs(result["error"]) < 1e-3
    expected = result["predicted_peak_allocated_bytes"] / result["measured_peak_allocated_bytes"] - 1
    assert result["error"] == expected


@pytest.mark.slow
def test_a_launch_config_is_read(tmp_path):
    """ZeRO-3 with everything offloaded: the host has the optimizer's state, not the device, and the bucket is the
    config's: 20 million elements of bf16. (The tiny model's weights are all below the config's threshold and stay.)"""
    single = probe(tiny_config())
    zero3 = probe(tiny_config(config_file=str(ROOT / "accelerate_configs/zero3.yaml")))
    assert (zero3["config"]["strategy"], zero3["config"]["offload"]) == ("zero3", "param")
    assert zero3["breakdown"]["optimizer"] < single["breakdown"]["optimizer"] / 10
    assert zero3["breakdown"]["communication"] == 2 * 20_000_000
    assert zero3["host_bytes"] > single["host_bytes"]


@pytest.mark.slow
def test_the_command_and_its_verdict():
    """What a user sees: the table, the verdict, one JSON line; exit code 0 where it fits and 3 where it does not."""
    fits = start("--model", "tiny", "--max-seq-len", "48", "--lora-r", "4", "--mode", "predict")
    assert fits.returncode == 0, fits.stderr
    assert "FITS RTX 4090" in fits.stdout and "frozen weights" in fits.stdout
    assert json.loads(fits.stdout.splitlines()[-1])["fits"] is True
    too_small = start("--model", "tiny", "--max_seq_len", "48", "--mode", "predict", "--budget_gib", "0.1")
    assert too_small.returncode == 3
    assert "DOES NOT FIT" in too_small.stdout
    assert json.loads(too_small.stdout.splitlines()[-1])["fits"] is False


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_output_has_the_result_and_the_step(device, tmp_path, capsys):
    """probe.json is what main returns; the picture, the page and the snapshot are of that step. A CPU has no segments,
    and so no snapshot."""
    folder = tmp_path / "out"
    result = run_probe(tiny_config(device=device, output=str(folder)))
    names = {"probe.json", "step.png", "step.html"} | ({"snapshot.pickle"} if device == "cuda" else set())
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "probe.json").read_text()) == result
    assert Image.open(folder / "step.png").size[0] > 500
    assert f"predicted for {device}" in (folder / "step.html").read_text()
    assert device == "cpu" or b"frozen weights" in (folder / "snapshot.pickle").read_bytes()
    assert "Saved to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mode": "guess"}, ["--mode guess", "predict"]),
        ({"device": "tpu"}, ["--device tpu"]),
        ({"gpu": "rtx9090"}, ["--gpu rtx9090", "rtx4090"]),
        ({"budget_gib": 0.0}, ["--budget_gib 0.0", "above 0"]),
        ({"strategy": "zero9"}, ["--strategy zero9"]),
        ({"strategy": "zero2", "offload": "param"}, ["--offload param", "zero3"]),
        ({"checkpoint_num_layers": -1}, ["--checkpoint_num_layers -1", "at least 0"]),
        ({"checkpoint_num_layers": 3, "checkpoint_num_mlps": 2}, ["--checkpoint_num_mlps 2", "4 decoder layers"]),
        ({"max_seq_len": 2049}, ["--max_seq_len 2049", "has 2048 positions", "choose --max_seq_len 2048 or less"]),
        ({"images_per_sample": 40}, ["--images_per_sample 40", "max_seq_len is 48; choose --max_seq_len 768"]),
        ({"image_size": "99999x99999"}, ["--image_size 99999x99999", "pixels, as in training"]),
        ({"config_file": "missing.yaml"}, ["--config_file missing.yaml"]),
        ({"config_file": DDP, "strategy": "zero2"}, ["--strategy zero2", f"--config_file {DDP} says ddp, give one"]),
        ({"config_file": DDP, "offload": "param"}, ["--offload param", f"--config_file {DDP} says none, give one"]),
        ({"model": "mgm-3b"}, ["--model mgm-3b"]),
    ],
)
def test_what_cannot_be(flags, words):
    """One line with the flag and what it could be."""
    with pytest.raises(UserError) as error:
        probe(tiny_config(**flags))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lora_r": 0, "lora_target_modules": ["q_proj"]},
        {"eval_samples": 0},
        {"strategy": "zero3", "offload": "param"},
    ],
)
def test_the_evaluation_is_measured(flags):
    """With many questions at once answering takes more than a step, in a real run on the CPU as predicted."""
    result = probe(tiny_config(mode="both", device="cpu", per_device_eval_batch_size=64, **flags))
    phases = result["phases"]
    training = max(phases[name] for name in ("load", "forward", "backward", "step", "save"))
    assert abs(result["error"]) < 2e-4
    if flags.get("eval_samples") == 0:
        assert phases["evaluate"] == 0 and result["peak_allocated_bytes"] == training
    else:
        assert result["peak_allocated_bytes"] == phases["evaluate"] > 1.2 * training


def test_answering_one_question_takes_less_than_a_step(predicted):
    assert 0 < predicted["phases"]["evaluate"] < predicted["peak_allocated_bytes"]
