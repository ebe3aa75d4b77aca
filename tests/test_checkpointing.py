"""Layers checkpointed whole, MLPs alone: the same step, no more recomputed than was asked for, and what it saves."""

from collections import Counter
from collections.abc import Callable

import pytest
from conftest import assert_same_gradients
from torch import nn

from memory.config import ProbeConfig
from memory.measure_cpu import measure_single
from memory.predict import predict
from memory.trace import trace_single


PARTS = [(1, 2), (0, 4), (2, 0)]  # of four layers: how many whole, how many MLPs
ALL_LINEAR = {"lora_target_modules": ["all-linear"]}


def parts(num_layers: int, num_mlps: int) -> dict[str, int]:
    return {"checkpoint_num_layers": num_layers, "checkpoint_num_mlps": num_mlps}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        ALL_LINEAR,
        {"lora_target_modules": ["gate_proj"]},  # the first MLP's input needs no gradient
        {"lora_r": 0},
        {"trainable_modules": ["mlp"]},  # PEFT wraps the MLPs
        {"quantize": "nf4"},
        {"mlp_tiles": 3},
        {"model": "data/tiny_mgm"},
        {"model": "data/tiny_mgm"} | ALL_LINEAR,
    ],
    ids=str,
)
def test_a_step_is_the_same(tiny_step: Callable[..., dict], flags: dict) -> None:
    """Loss and all gradients of what recomputes nothing. With dropout: the same numbers are drawn again."""
    flags = flags | {"lora_dropout": 0.2}
    plain = tiny_step(gradient_checkpointing=False, **flags)
    for each in PARTS:
        assert_same_gradients(tiny_step(**parts(*each), **flags), plain)


@pytest.mark.parametrize("flags", [{}, ALL_LINEAR, {"lora_r": 0}], ids=str)
def test_what_is_recomputed(tiny_step: Callable[..., dict], flags: dict) -> None:
    """Of the first layer all, of the next two the MLP, of the last one nothing."""
    calls = Counter()

    def watch(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith(("k_proj", "gate_proj")) and "language_model" in name:
                module.register_forward_hook(lambda *_, name=name: calls.update([name.split("layers.")[1]]))

    tiny_step(watch, **parts(1, 2), **flags)
    assert [calls[f"{index}.self_attn.k_proj"] for index in range(4)] == [2, 1, 1, 1]
    assert [calls[f"{index}.mlp.gate_proj"] for index in range(4)] == [2, 2, 2, 1]


def cpu_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(**({"model": "tiny", "mode": "predict", "device": "cpu", "mixed_precision": "no"} | flags))


@pytest.mark.parametrize(
    "flags",
    [{}, ALL_LINEAR, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"lora_r": 0}, {"mlp_tiles": 2}))],
    ids=str,
)
def test_prediction_is_measured(flags: dict) -> None:
    """The peak of a mixture on this CPU, within 0.01 %."""
    config = cpu_config(max_seq_len=400, per_device_train_batch_size=2, eval_samples=0, **parts(1, 2), **flags)
    assert trace_single(config).peak_bytes == pytest.approx(measure_single(config), rel=1e-4)


@pytest.mark.parametrize("flags", [{}, pytest.param(ALL_LINEAR, marks=pytest.mark.slow)], ids=str)
def test_a_scale_from_least_memory_to_least_time(flags: dict) -> None:
    """Predicted for a GPU: each layer and each MLP that is no longer recomputed takes memory and saves time, until it
    is a step without checkpointing."""
    flags = {"model": "tiny", "mode": "predict", "max_seq_len": 512, "per_device_train_batch_size": 8} | flags
    flags |= {"eval_samples": 0, "trainable_modules": []}  # mining is recomputed while anything is
    scale = [(4, 0), (3, 1), (2, 2), (0, 4), (0, 3), (0, 1), (0, 0)]
    found = [predict(ProbeConfig(**parts(*each), **flags)) for each in scale]
    peaks, seconds = ([each[name] for each in found] for name in ("peak_allocated_bytes", "step_seconds"))
    assert peaks == sorted(set(peaks)) and seconds == sorted(set(seconds), reverse=True)
    plain = predict(ProbeConfig(gradient_checkpointing=False, **flags))
    assert all(found[-1][name] == plain[name] for name in ("peak_allocated_bytes", "step_seconds"))
