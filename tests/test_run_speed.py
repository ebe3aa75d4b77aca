"""The seconds of a run's updates beside the predicted ones: which updates count, the line, the warning, the tags."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import training.run_speed
from data.worst_case import Row
from memory.margin import TIME_MARGIN
from memory.measure_time import WARM_UP_UPDATES
from training.config import TrainConfig
from training.run_forecast import RunForecast
from training.run_speed import RunSpeed


ROOT = Path(__file__).parent.parent
UPDATE_TOKENS = 2 * 2 * 50  # predicted: two micro-batches of two rows
SLOW_START = [(9.0, 50)] * WARM_UP_UPDATES


class Clock:
    """time.perf_counter of a run whose updates take what they are told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training.run_speed, "time", clock)
    return clock


def run_updates(speed: RunSpeed, clock: Clock, updates: list[tuple[float, int]]) -> None:
    """Each of some seconds, with two micro-batches of two rows of so many tokens."""
    speed.start()
    for seconds, num_tokens in updates:
        for _ in range(2):
            speed.micro_batch({"input_ids": torch.zeros(2, num_tokens)})
        clock.now += seconds
        speed.update()


def test_the_median_of_updates_as_large_as_the_predicted_one(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """Neither the first updates nor small ones count; a few slow ones change nothing. By hand: 0.22 / 0.2 - 1."""
    speed = RunSpeed(UPDATE_TOKENS, on_gpu=True)
    speed.predict({"step_seconds": 0.22})
    run_updates(speed, clock, [*SLOW_START, (0.2, 50), (0.1, 40), (0.2, 46), (0.1, 20), (0.1, 10), (5.0, 50)])
    result = speed.finish(None)
    assert result["measured_step_seconds"] == pytest.approx(0.2) and result["predicted_step_seconds"] == 0.22
    assert result["error"] == pytest.approx(0.1) and result["problem"] is None
    output = capsys.readouterr()
    assert output.out == "Seconds of an update: predicted 0.22, measured 0.2 (+10%)\n" and output.err == ""


def test_smaller_updates_are_not_compared(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """No error and no warning; the line says how small they were."""
    speed = RunSpeed(UPDATE_TOKENS, on_gpu=True)
    speed.predict({"step_seconds": 1.0})
    run_updates(speed, clock, [*SLOW_START, (0.1, 20), (0.2, 40), (0.1, 30)])
    result = speed.finish(None)
    assert result["error"] is None and result["measured_step_seconds"] == pytest.approx(0.1)
    assert result["problem"] == "in smaller updates: 120 tokens on average, predicted: 200"
    output = capsys.readouterr()
    assert f"predicted 1, measured 0.1 ({result['problem']})" in output.out and output.err == ""


def test_nothing_measured_or_predicted(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """A run that is as short as its warm-up, and one whose forecast did not come."""
    short = RunSpeed(UPDATE_TOKENS, on_gpu=True)
    short.predict({"step_seconds": 1.0})
    run_updates(short, clock, SLOW_START)
    assert short.finish(None)["problem"] == f"the first {WARM_UP_UPDATES} updates do not count"
    alone = RunSpeed(UPDATE_TOKENS, on_gpu=True)
    run_updates(alone, clock, [*SLOW_START, (0.2, 50)])
    result = alone.finish("--forecast false")
    assert result["problem"] == "--forecast false" and result["measured_step_seconds"] == pytest.approx(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert "predicted 1, nothing measured (the first" in lines[0]
    assert "no prediction (--forecast false), measured 0.2" in lines[1]


def test_a_cpu_has_no_prediction_and_no_line(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """What was measured is in run.json."""
    speed = RunSpeed(UPDATE_TOKENS, on_gpu=False)
    speed.predict({"step_seconds": None})
    run_updates(speed, clock, [*SLOW_START, (0.2, 50)])
    result = speed.finish(None)
    assert result["problem"] == "no prediction of time for a CPU" and result["predicted_step_seconds"] is None
    assert result["measured_step_seconds"] == pytest.approx(0.2) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "num_processes", "words"),
    [
        (-0.4, 1, "--dataloader_num_workers"),
        (0.4, 1, "--calibrate"),
        (-0.3, 1, None),
        (0.3, 1, None),
        (-0.4, 2, None),
    ],
)
def test_a_warning_beyond_the_margin(
    error: float, num_processes: int, words: str | None, clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    """One line on stderr with both figures and what to look at. Of several processes the margin is not known."""
    speed = RunSpeed(UPDATE_TOKENS, on_gpu=True, num_processes=num_processes)
    speed.predict({"step_seconds": 1 + error})
    run_updates(speed, clock, [*SLOW_START, (1.0, 50)])
    assert speed.finish(None)["error"] == pytest.approx(error)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (words is not None)
    if words:
        assert words in warnings[0] and f"took 1 s, predicted were {1 + error:.3g} s" in warnings[0]


def test_the_margin_is_the_worst_error_that_was_measured() -> None:
    """Over the rows from which no constant comes, rounded."""
    held_out = json.loads((ROOT / "results/gpu/step_time.json").read_text())["held_out"]
    assert TIME_MARGIN == round(held_out["step_seconds"]["worst_error"], 2)


def test_tags_and_chart(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The measured line and the predicted one, which begins at step 0, and one layout with both parts' charts."""
    result = {"step_seconds": 0.3, "breakdown": {}, "peak_allocated_bytes": 1, "host_bytes": 1}
    forecast = SimpleNamespace(poll=lambda: result, stop=lambda: None, problem=None)
    monkeypatch.setattr("training.run_forecast.Forecast", lambda *_: forecast)
    accelerator = SimpleNamespace(
        distributed_type="DEEPSPEED", is_fsdp2=False, gradient_accumulation_steps=1, num_processes=1
    )
    with SummaryWriter(str(tmp_path)) as writer:
        compared = RunForecast(accelerator, TrainConfig(), nn.Linear(1, 1), None, Row(50, 0), writer)
        compared.start()
        for step, seconds in enumerate((0.1, 0.4, 0.2), start=1):
            compared.micro_batch({"input_ids": torch.zeros(1, 50)})
            clock.now += seconds
            compared.update()
            compared.log(step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    measured = [(event.step, event.value) for event in events.Scalars("time/step_seconds")]
    assert measured == [(1, pytest.approx(0.1)), (2, pytest.approx(0.25)), (3, pytest.approx(0.2))]
    predicted = [(event.step, event.value) for event in events.Scalars("time/predicted_step_seconds")]
    assert predicted == [(step, pytest.approx(0.3)) for step in range(4)]
    [layout] = events.Tensors("custom_scalars__config__")
    text = layout.tensor_proto.string_val[0].decode(errors="replace")
    assert "time/predicted_step_seconds" in text and "memory/predicted_peak_allocated_bytes" in text
