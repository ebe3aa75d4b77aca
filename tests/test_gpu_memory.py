"""What is predicted is what a GPU takes, of MGM-2B at its real size: what `memory_probe.py --mode both` compares.

A process of its own is measured. Nothing may hold the GPU beside it, this process neither: conftest.py puts these
tests first.
"""

from typing import Any

import pytest
import torch

from memory.cards import this_gpu
from memory.config import ProbeConfig
from memory.measure_time import measure_time
from memory.probe import probe


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ZERO3 = {"config_file": "accelerate_configs/zero3.yaml"}
ALLOCATED_ERROR = 0.001


@pytest.mark.parametrize(
    ("flags", "device_error"),
    [
        ({"per_device_eval_batch_size": 8}, 0.01),
        # The allocator has reserved 1.2 to 1.4 % less than predicted.
        ({"max_seq_len": 4096, "lora_target_modules": ["all-linear"]}, 0.02),
        ({"max_seq_len": 1024, "gradient_checkpointing": False, "packing": True}, 0.01),
        ({"checkpoint_num_layers": 6, "checkpoint_num_mlps": 6}, 0.01),
        # Where there is room, ZeRO-3 has reserved up to 57 % more than predicted, for one more gathered weight.
        # Here the allocator may reserve 2.24 GiB, 15 % more, and the step has to do with that.
        (ZERO3 | {"max_seq_len": 1024, "budget_gib": 3.55}, 0.1),
    ],
    ids=str,
)
def test_prediction_is_measured(flags: dict[str, Any], device_error: float) -> None:
    """Allocated, on the device, and in the evaluation, which has the peak where it answers eight questions at once."""
    found = probe(ProbeConfig(model="mgm-2b", mode="both", gpu=this_gpu(), **flags))
    measured = found["measured"]
    assert measured["oom"] is None
    errors = {name: found[name] / measured[name] - 1 for name in ("peak_reserved_bytes", "device_bytes", "host_bytes")}
    errors |= {name: found["phases"][name] / peak - 1 for name, peak in measured["phases"].items()}
    print(flags, f"{found['error']:+.4%}", {name: f"{error:+.3%}" for name, error in errors.items()})
    assert abs(found["error"]) < ALLOCATED_ERROR
    assert abs(errors["evaluate"]) < ALLOCATED_ERROR
    assert abs(errors["device_bytes"]) < device_error


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(strategy: str) -> None:
    """The first and the last: allocated within 0.2 %, the device within 3 %."""
    config = ProbeConfig(model="mgm-2b", mode="both", gpu=this_gpu(), strategy=strategy, world_size=2, eval_samples=0)
    found = probe(config)
    measured = found["measured"]
    for predicted, rank in ((found, measured), (found["last_rank"], measured["last_rank"])):
        names = ("peak_allocated_bytes", "device_bytes")
        errors = {name: predicted[name] / rank[name] - 1 for name in names}
        print(strategy, {name: f"{error:+.3%}" for name, error in errors.items()})
        assert rank["oom"] is None
        assert abs(errors["peak_allocated_bytes"]) < 0.002 and abs(errors["device_bytes"]) < 0.03


@pytest.mark.parametrize("flags", [{}, {"per_device_train_batch_size": 4, "gradient_checkpointing": False}], ids=str)
def test_the_time_of_an_update(flags: dict[str, Any]) -> None:
    """Measured, within 30 % of the prediction: where the host is the slower one, and where the GPU is."""
    config = ProbeConfig(model="mgm-2b", mode="predict", gpu=this_gpu(), eval_samples=0, **flags)
    measured = measure_time(config, config.launch)
    seconds = probe(config)["step_seconds"]
    print(flags, f"{seconds:.3f} s predicted, {measured['step_seconds']:.3f} s measured")
    assert seconds == pytest.approx(measured["step_seconds"], rel=0.3)


@pytest.mark.parametrize("model", ["qwen3-vl-2b", "smolvlm2-2.2b", "gemma-3-4b"])
def test_other_families(model: str) -> None:
    """LoRA on 2048 tokens with an image: device memory within 3 %, and never more than 2 % under."""
    found = probe(ProbeConfig(model=model, mode="both", gpu=this_gpu(), eval_samples=0))
    measured = found["measured"]
    error = found["device_bytes"] / measured["device_bytes"] - 1
    print(model, f"allocated {found['error']:+.3%}, device {error:+.3%}", found["notes"])
    assert measured["oom"] is None and -0.02 < error < 0.03
