"""FSDP2's units and refusals. What two processes train under it is in the tests of train.py, of checkpoints and of
eval.py, beside the other strategies."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from models.fsdp2 import fsdp2_plugin, is_sharded, own_part, prepare_sharded, split_like, whole
from models.loading import load_model
from models.zero3_leaves import whole_layers
from step import StepConfig, build_model, fuses_optimizer
from utils import UserError


LAUNCH = yaml.safe_load((Path(__file__).parent.parent / "accelerate_configs/fsdp2.yaml").read_text())


def launch(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """What accelerate's launcher sets for fsdp2.yaml, with other settings."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key, value in (LAUNCH["fsdp_config"] | settings).items():
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))


def test_the_launch_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and gradients keep their dtype: accelerate's own policy would take both to 16 bits."""
    assert fsdp2_plugin() is None
    launch(monkeypatch)
    plugin = fsdp2_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and not plugin.cpu_ram_efficient_loading
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.param_dtype is plugin.mixed_precision_policy.reduce_dtype is None


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("fsdp_version", 1, "set it to 2"),
        ("fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", "a layer must be gathered as a whole, set it to TRANSFORMER_"),
        ("fsdp_auto_wrap_policy", "", "fsdp_auto_wrap_policy is not set"),
        ("fsdp_activation_checkpointing", True, "--gradient_checkpointing does it, set it to false"),
    ],
)
def test_refused_launch_configs(key: str, value: object, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, **{key: value})
    with pytest.raises(UserError, match=f"^the launch config's {key} is .*") as error:
        fsdp2_plugin()
    assert remedy in str(error.value) and "\n" not in str(error.value)


def test_4_bit_weights_are_refused() -> None:
    config = StepConfig(model="tiny")
    config.mixed_precision = "fp16"  # this machine's CPU would refuse it
    with pytest.raises(UserError, match="--mixed_precision fp16: accelerate's loss scaler fails under FSDP2"):
        build_model(config, is_deepspeed=False, is_fsdp=True)
    with pytest.raises(UserError, match="--quantize nf4: FSDP2 would not split 4-bit weights, choose ddp.yaml"):
        build_model(StepConfig(model="tiny", quantize="nf4"), is_deepspeed=False, is_fsdp=True)


def test_buffers_that_one_process_has_read_are_refused() -> None:
    """accelerate hands out a model's parameters alone."""
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(UserError, match="fsdp_cpu_ram_efficient_loading is true: .*running_mean.* set it to false"):
        prepare_sharded(accelerator, nn.BatchNorm1d(2), None)


def test_units() -> None:
    """The layers of the decoder and of both image encoders."""
    model = load_model("tiny-hd", torch.float32, "sdpa")
    assert {type(layer).__name__ for layer in whole_layers(model)} == {
        "CLIPEncoderLayer", "ConvNextStage", "GemmaDecoderLayer"
    }  # fmt: skip


@pytest.mark.parametrize(("is_fsdp2", "optim", "expected"), [(1, "adamw_torch", 1), (1, "sgd", 0), (0, "sgd", 1)])
def test_fused_optimizers(is_fsdp2: bool, optim: str, expected: bool) -> None:
    state, gpu = SimpleNamespace(deepspeed_plugin=None), SimpleNamespace(type="cuda")
    accelerator = SimpleNamespace(scaler=None, state=state, device=gpu, is_fsdp2=is_fsdp2)
    assert fuses_optimizer(accelerator, optim) == expected


def test_what_is_not_split() -> None:
    """Under the other strategies a tensor is itself."""
    tensor = torch.ones(3)
    assert not is_sharded([tensor])
    assert whole(tensor) is own_part(tensor) is split_like(tensor, tensor) is tensor
