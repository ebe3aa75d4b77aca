"""Predicted beside measured in a run: the measure against a fresh process's, the tags, the line, what is missing."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from data.worst_case import Row
from memory.config import ProbeConfig
from memory.cpu_profile import bytes_in_use
from memory.measure_cpu import measure_single
from memory.probed_step import ProbedStep, local_accelerator
from memory.trace import trace_single
from training.config import TrainConfig
from training.run_forecast import RunForecast
from training.run_memory import RunMemory
from utils import GIB


ROOT = Path(__file__).parent.parent
STEP = {
    "mode": "predict",
    "device": "cpu",
    "model": "tiny",
    "per_device_train_batch_size": 2,
    "lora_r": 4,
    "max_seq_len": 60,
    "mixed_precision": "no",
    "eval_samples": 0,
}


class StandInForecast:
    """Comes when it is told to."""

    result, problem = None, None

    def __init__(self, *_: object) -> None: ...

    def poll(self) -> dict | None:
        return self.result

    def stop(self) -> None:
        self.problem = None if self.result else "the run ended before it was computed"


def run(config: ProbeConfig, folder: Path, num_updates: int, result: dict | None, forecast: bool = True) -> dict:
    """A few real updates on the worst case of a batch, the forecast coming after the first."""
    with local_accelerator(config) as accelerator:
        probed = ProbedStep.build(config, accelerator)
        probed.prepare()
        with SummaryWriter(str(folder)) as writer:
            flags = TrainConfig(**config.step_flags, forecast=forecast)
            compared = RunForecast(accelerator, flags, probed.model, probed.optimizer, Row(60, 1), writer)
            for update in range(num_updates * config.gradient_accumulation_steps):
                probed.micro_batch()
                compared.micro_batch(probed.batch)
                compared.log(update + 1)
                if forecast:
                    compared.forecast.result = result
            return compared.finish(gpu_peak_bytes=0)["memory"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run_forecast.Forecast", StandInForecast)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_measured_in_the_run_as_in_a_process_of_its_own(stand_in, tmp_path, capsys, accumulation):
    """The second update's last micro-batch: within 0.1 % of what memory_probe.py measures of that batch. What can be
    looked up is, to the byte, what is predicted; the predicted lines begin at step 0."""
    config = ProbeConfig(**STEP, gradient_accumulation_steps=accumulation)
    record = trace_single(config)
    predicted = {"peak_allocated_bytes": record.peak_bytes, "breakdown": record.breakdown(), "host_bytes": 1}
    predicted["step_seconds"] = None
    others_bytes = bytes_in_use(nn.Identity())  # what other tests have left behind: a run's process has no such thing
    got = run(config, tmp_path, 3, predicted)
    expected = measure_single(config)
    assert got["measured_peak_allocated_bytes"] - others_bytes == pytest.approx(expected, rel=1e-3)
    assert got["error"] == got["predicted_peak_allocated_bytes"] / got["measured_peak_allocated_bytes"] - 1
    for name in ("weights", "trained", "optimizer"):
        assert got["measured"][f"{name}_bytes"] == record.breakdown()[name]
    assert got["measured"]["gradients_bytes"] == record.breakdown()["trained"]
    assert got["predicted_batch"] == {"rows": 2, "num_tokens": 60, "num_images": 1, "image_size": (640, 480)}
    line = capsys.readouterr().out.splitlines()[-1]
    predicted_gib, measured_gib = (got[f"{word}_peak_allocated_bytes"] / GIB for word in ("predicted", "measured"))
    words = f"predicted {predicted_gib:.3f} GiB, measured {measured_gib:.3f} GiB ({got['error']:+.2%})"
    assert line == f"Memory of tensors at the peak: {words}"
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    predicted_steps = [event.step for event in events.Scalars("memory/predicted_peak_allocated_bytes")]
    assert predicted_steps[0] == 0 and len(set(predicted_steps)) == len(predicted_steps) > 2
    assert {"memory/peak_allocated_bytes", "memory/optimizer_bytes", "memory/gradients_bytes"} <= set(
        events.Tags()["scalars"]
    )
    assert any("custom_scalars" in tag for tag in events.summary_metadata)


def test_what_is_missing_is_said(stand_in, tmp_path, capsys):
    """No prediction in time and a single update: one line says both, and run.json has nulls."""
    got = run(ProbeConfig(**STEP), tmp_path, 1, None)
    assert got["predicted_peak_allocated_bytes"] is got["measured_peak_allocated_bytes"] is got["error"] is None
    line = capsys.readouterr().out.splitlines()[-1]
    assert "no prediction (the run ended before it was computed), nothing measured" in line
    assert "in the second update" in line


def test_nothing_is_measured_of_fsdp2_on_a_cpu(monkeypatch, capsys):
    """The line and run.json say why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Linear(2, 2)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, gradient_accumulation_steps=1)
    optimizer = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters()))
    memory = RunMemory(accelerator, model, optimizer, 2, Row(60, 1))
    assert memory.finish(0, None)["problem"] == "nothing measured: under FSDP2 that needs a GPU"
    assert "nothing measured (under FSDP2 that needs a GPU)" in capsys.readouterr().out


def test_without_a_forecast(monkeypatch, tmp_path, capsys):
    """--forecast false: no process is started, and the line says why nothing is predicted."""
    monkeypatch.setattr("training.run_forecast.Forecast", lambda *_: pytest.fail("a process was started"))
    got = run(ProbeConfig(**STEP), tmp_path, 2, None, forecast=False)
    assert got["problem"] == "--forecast false" and got["measured_peak_allocated_bytes"]
    assert "no prediction (--forecast false), measured 0." in capsys.readouterr().out.splitlines()[-1]


def test_no_process_to_be_had(monkeypatch, tmp_path, capsys):
    """Where no process can be started the run goes on."""

    def refuse(*_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("training.run_forecast.Forecast", refuse)
    accelerator = SimpleNamespace(
        distributed_type="DEEPSPEED", is_fsdp2=False, gradient_accumulation_steps=1, num_processes=1
    )
    with SummaryWriter(str(tmp_path)) as writer:
        compared = RunForecast(accelerator, TrainConfig(), torch.nn.Linear(1, 1), None, Row(1, 0), writer)
        compared.log(1)
        assert "Resource temporarily" in compared.finish(0)["memory"]["problem"]
    assert "Resource temporarily" in capsys.readouterr().out


def test_on_a_gpu_the_largest_batch_counts(monkeypatch, capsys):
    """The allocator's peak is of all updates: it is compared if one of them had the predicted shape."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", is_fsdp2=False, gradient_accumulation_steps=1)
    memory = RunMemory(accelerator, nn.Linear(1, 1), None, 2, Row(60, 1))
    memory.predicted = {"peak_allocated_bytes": GIB}
    for num_tokens, words in ((40, "in a smaller batch (2 x 40 tokens"), (60, "(+0.00%)"), (20, "(+0.00%)")):
        memory.micro_batch({"input_ids": torch.zeros(2, num_tokens)})
        memory.finish(GIB, problem=None)
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "num_tokens", "words"),
    [
        (-0.03, 60, "leave room for the difference"),
        (-0.03, 40, "leave room for the difference"),  # a smaller batch has taken more than the largest one should
        (0.03, 60, "fewer images or labels"),
        (0.03, 40, None),
        (0.01, 60, None),
        (-0.01, 60, None),
    ],
)
def test_a_warning_beyond_the_margin(error, num_tokens, words, capsys):
    """One line on stderr with both figures, and what to look at. A smaller batch that takes less is none."""
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", is_fsdp2=False, gradient_accumulation_steps=1)
    memory = RunMemory(accelerator, nn.Linear(1, 1), None, 2, Row(60, 1))
    memory.predicted = {"peak_allocated_bytes": round(GIB * (1 + error))}
    memory.measured = {"peak_allocated_bytes": GIB}
    memory.measured_shape = (2, num_tokens)
    memory.finish(GIB, problem=None)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (words is not None)
    if words:
        assert words in warnings[0] and "took 1.000 GiB" in warnings[0] and f"were {1 + error:.3f} GiB" in warnings[0]


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    """train.py as users start it: the prediction of the data's longest batch is within 3 % of what a step took."""
    flags = f"--max_steps 60 --logging_steps 5 --eval_samples 0 --output_dir {tmp_path / 'out'}"
    done = subprocess.run([sys.executable, "train.py", *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        sum(line.startswith("Memory of tensors at the peak: predicted 0.") for line in done.stdout.splitlines()) == 1
    )
    result = json.loads((tmp_path / "out/run.json").read_text())
    assert abs(result["memory"]["error"]) < 0.03 and result["memory"]["problem"] is None
    assert result["speed"]["measured_step_seconds"] > 0
    assert result["speed"]["problem"] == "no prediction of time for a CPU"
    assert "Seconds of an update" not in done.stdout
