"""Loading an adapter: its tensors are exactly those that were trained, or a line says which do not fit."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from models.adapter import load_adapter
from models.loading import load_model, load_processor
from models.lora import count_parameters
from step import StepConfig, build_model
from training.saving import save_trained
from utils import UserError


MODEL = "data/tiny_mgm"
KINDS = {  # flags of train.py, and a tensor of each sort that they train
    "LoRA": ({}, ["lora_A", "lora_B", "multi_modal_projector", "patch_info_mining"]),
    "LoRA alone": ({"trainable_modules": []}, ["lora_A"]),
    "DoRA": ({"use_dora": True}, ["lora_magnitude_vector"]),
    "all biases": ({"lora_bias": "all"}, ["vision_tower.encoder.layers.0.mlp.fc1.bias", "multi_modal_projector"]),
    "LoRA's biases": ({"lora_bias": "lora_only"}, ["lora_B"]),
    "a tower in full": ({"trainable_modules": ["vision_tower"]}, ["post_layernorm", "encoder.layers.0"]),
}


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path, list[str]]:
    """A model with random trained parameters, its adapter's folder as train.py saves it, and sorts of tensors."""
    flags, sorts = KINDS[request.param]
    model = build_model(StepConfig(model=MODEL, mixed_precision="no", **flags), is_deepspeed=False).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    save_trained(Accelerator(cpu=True), model, load_processor(MODEL), tmp_path)
    return model, tmp_path, sorts


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    return load_adapter(load_model(MODEL, dtype, "sdpa"), str(folder))


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_was_saved_is_what_is_loaded(trained):
    """Every tensor, in the precision that PEFT itself loads it in, frozen and in eval mode."""
    model, folder, _ = trained
    loaded = load(folder)
    found, expected = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    peft = PeftModel.from_pretrained(load_model(MODEL, torch.bfloat16, "sdpa"), folder)
    in_bf16 = dict(load(folder, torch.bfloat16).named_parameters())
    for name, parameter in peft.named_parameters():
        assert in_bf16[name].dtype == parameter.dtype and torch.equal(in_bf16[name], parameter), name


def test_a_missing_tensor_is_named(trained):
    """One of each sort: PEFT itself would go on with the base's tensor, or a random one, and warn of some."""
    _, folder, sorts = trained
    original = load_file(folder / "adapter_model.safetensors")
    for sort in sorts:
        name = next(name for name in original if sort in name)
        rewrite(folder, lambda tensors, name=name: tensors.pop(name))
        last_part = re.escape(name.removeprefix("base_model.model.").split(".lora_")[0])
        with pytest.raises(UserError, match=rf"--adapter .*: it does not fit the model \(missing .*{last_part}"):
            load(folder)
        rewrite(folder, lambda tensors, name=name: tensors.update({name: original[name]}))
    load(folder)


def test_a_superfluous_tensor_is_named(trained):
    _, folder, _ = trained
    name = "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(16, 8)}))
    with pytest.raises(UserError, match=r"it does not fit the model \(unexpected .*layers\.9\.self_attn\.q_proj"):
        load(folder)


def test_duplicates_do_not_count(trained):
    """PEFT trains a copy of a module that is trained in full and keeps the original: the model has it once."""
    model, *_ = trained
    total, num_trained = count_parameters(model)
    base = sum(parameter.numel() for parameter in load_model(MODEL, torch.float32, "sdpa").parameters())
    added = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    assert total == base + added
    assert num_trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
