"""What a run saves is read back and compared, and merged: nothing that was trained may be missing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import write_family
from torch import nn

from conversion.merge import MergeConfig
from conversion.merge import main as merge
from models.loading import load_model
from models.lora import trained_parameters
from step import StepConfig, build_model
from training.read_back import check_saved, last_logits
from utils import UserError


def trained_model(**flags: object) -> nn.Module:
    """Trained, as it were: what is to be trained has other values than at first."""
    config = StepConfig(**({"model": "data/tiny_mgm", "lora_r": 4} | flags))
    model = build_model(config, is_deepspeed=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained_model()


def test_an_embedding_trained_in_fp32_beside_bf16(tmp_path: Path) -> None:
    """PEFT would read it back in the dtype of the frozen weights."""
    write_family("llama", tmp_path / "model", with_weights=True)
    model = trained_model(model=str(tmp_path / "model"), trainable_modules=["embed_tokens"], mixed_precision="bf16")
    model.save_pretrained(tmp_path / "out")
    with torch.autocast("cpu", torch.bfloat16):  # as accelerate's forward
        check_saved(model, tmp_path / "out")


def test_accepts_what_was_trained(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_saved(model, tmp_path)
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_sees_a_tensor_that_is_missing_and_a_wrong_scale(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    left_out = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != left_out}, path)
    with pytest.raises(RuntimeError, match="does not hold all that was trained"):
        check_saved(model, tmp_path)
    save_file(tensors, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}))
    with pytest.raises(RuntimeError, match="does not hold all that was trained"):
        check_saved(model, tmp_path)


def test_compares_all_tensors_after_full_fine_tuning(tmp_path: Path) -> None:
    model = load_model("data/tiny_mgm", torch.float32, "sdpa")
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"up_proj\.weight is not what was trained"):
        check_saved(model, tmp_path)


def test_merged_answers_as_with_the_adapter(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    result = merge(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "merged")))
    merged = load_model(result["output"], torch.float32, "sdpa")
    torch.testing.assert_close(last_logits(merged), last_logits(model), rtol=1e-4, atol=1e-4)
    base = load_model("data/tiny_mgm", torch.float32, "sdpa")
    assert (last_logits(merged) - last_logits(base)).abs().max() > 0.1
    with pytest.raises(UserError, match="exists: choose a new folder"):
        MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "merged"))
    with pytest.raises(UserError, match="give --adapter DIR"):
        MergeConfig(output="x")
