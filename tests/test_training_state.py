"""What a checkpoint keeps of the optimizer, and the attributes that DeepSpeed does not document.

That all of it is restored bitwise under every strategy is tested in test_resume.py.
"""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import get_scheduler

from training.training_state import LOSS_SCALER_STATE, TrainingState, deepspeed_attribute


def test_optimizer_state_is_what_adamw_makes(cpu_accelerator: Accelerator) -> None:
    """The same keys, shapes and types as after AdamW's own first step, and all of it 0."""
    made, expected = (build(cpu_accelerator) for _ in range(2))
    made.make_optimizer_state()
    for parameter in expected.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    expected.optimizer.step()
    expected.forget_steps()
    states = [[state.optimizer.state[p] for p in state.parameters.values()] for state in (made, expected)]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_a_fused_optimizer_counts_on_the_device(cpu_accelerator: Accelerator) -> None:
    """Others count on the host."""
    for fused, expected in ((True, "meta"), (False, "cpu")):
        state = build(cpu_accelerator)
        state.parameters = {name: parameter.to("meta") for name, parameter in state.parameters.items()}
        state.optimizer.defaults["fused"] = fused
        state.make_optimizer_state()
        steps = [state.optimizer.state[parameter]["step"] for parameter in state.parameters.values()]
        assert {step.device.type for step in steps} == {expected}


def test_what_is_saved_is_loaded(cpu_accelerator: Accelerator) -> None:
    """Parameters, moments and the step's number, into an optimizer that has not stepped."""
    trained, resumed = (build(cpu_accelerator) for _ in range(2))
    for parameter in trained.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    trained.optimizer.step()
    resumed.load_tensors(trained.tensors())
    saved, loaded = dict(trained.tensors()), dict(resumed.tensors())
    assert (
        saved.keys()
        == loaded.keys()
        == {f"{key}/{name}" for key in ("parameter", "step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    )
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
    assert trained.checksums() == resumed.checksums() != build(cpu_accelerator).checksums()


@pytest.fixture
def cpu_accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def build(accelerator: Accelerator) -> TrainingState:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = get_scheduler("constant", optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainingState(accelerator, model, optimizer, scheduler)


def test_a_missing_attribute_of_deepspeed_is_named() -> None:
    """With the version that lacks it: never a default in its place."""
    optimizer = SimpleNamespace(loss_scaler=None)
    assert deepspeed_attribute(optimizer, "loss_scaler") is None
    words = f"DeepSpeed {version('deepspeed')}: SimpleNamespace has no attribute 'bit16_groups'"
    with pytest.raises(RuntimeError, match=words):
        deepspeed_attribute(optimizer, "bit16_groups")


def test_what_changes_of_deepspeeds_loss_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is in a checkpoint: overflows up to a lower scale, then good steps up to a higher one."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it only decides who logs
    scaler = loss_scaler.DynamicLossScaler(
        2**16, scale_window=2, min_scale=1, delayed_shift=2, consecutive_hysteresis=0
    )
    changed, before = set(), dict(vars(scaler))
    for overflow in (True, True, False, False, False, False):
        scaler.update_scale(overflow)
        changed |= {name for name, value in vars(scaler).items() if value != before[name]}
    assert changed == set(LOSS_SCALER_STATE)
