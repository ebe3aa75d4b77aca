"""Merging an adapter, against PEFT's own merge and against the model with the adapter beside it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_files import LORA_TARGETS
from transformers import Qwen2Config

from conversion.merge_adapter import changed_modules, merge_adapter
from mgm.configuration_mgm import MGMConfig, tiny
from mgm.modeling_mgm import MGMForConditionalGeneration
from utils import UserError


ALL_LINEAR = r".*\blanguage_model\..*_proj"


def qwen2() -> MGMConfig:
    """The preset `tiny` with a language model whose q, k and v have biases and whose head is its own."""
    config = tiny()
    text_config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return MGMConfig(
        text_config=text_config,
        vision_config=config.vision_config,
        vision_config_aux=config.vision_config_aux,
        image_token_id=64,
    )


def base_model(config: MGMConfig, dtype: torch.dtype = torch.float32) -> MGMForConditionalGeneration:
    torch.manual_seed(0)
    return MGMForConditionalGeneration(config).to(dtype)


def save_adapter(config: MGMConfig, folder: Path, dtype: torch.dtype = torch.float32, **lora) -> Path:
    """An adapter as train.py writes it, all of its tensors random."""
    settings = {"target_modules": LORA_TARGETS, "modules_to_save": ["multi_modal_projector", "patch_info_mining"]}
    lora_config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **(settings | lora))
    model = get_peft_model(base_model(config), lora_config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape) / 10).to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16", "bf16 adapter"],
)
@pytest.mark.parametrize(
    ("make_config", "lora"),
    [
        (tiny, {}),
        (tiny, {"use_dora": True}),
        (tiny, {"use_rslora": True}),
        (tiny, {"target_modules": ALL_LINEAR, "use_dora": True, "use_rslora": True}),
        (tiny, {"target_modules": r".*\blanguage_model\..*\.(up_proj|k_proj)", "rank_pattern": {"up_proj": 2}}),
        (qwen2, {"bias": "lora_only"}),
        (qwen2, {"bias": "all"}),
        (qwen2, {"modules_to_save": None}),
    ],
    ids=[
        "plain",
        "DoRA",
        "rsLoRA",
        "all linear layers",
        "other targets",
        "biases of its layers",
        "all biases",
        "no modules",
    ],
)
def test_like_peft(tmp_path, dtype, adapter_dtype, make_config, lora):
    """Every tensor with PEFT's merge of a loaded adapter, bit for bit. In fp32 the merged model's logits with those of
    the model with the adapter beside it."""
    config = make_config()
    save_adapter(config, tmp_path, adapter_dtype, **lora)
    base = dict(base_model(config, dtype).state_dict())
    merged = merge_adapter(base_model(config, dtype), tmp_path)

    peft_model = PeftModel.from_pretrained(base_model(config, dtype), tmp_path).eval()
    input_ids = torch.randint(6, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = peft_model(input_ids=input_ids).logits
    expected = peft_model.merge_and_unload().state_dict()
    assert expected.keys() == merged.keys() == base.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == dtype and torch.equal(merged[name], tensor), name
    changed = {name for name in base if not torch.equal(base[name], merged[name])} - {"lm_head.weight"}
    assert changed and {name.rpartition(".")[0] for name in changed} <= changed_modules(tmp_path)
    if dtype == torch.float32:
        model = base_model(config).eval()
        assert not torch.allclose(model(input_ids=input_ids).logits, logits, atol=1e-3)
        model.load_state_dict(merged)
        torch.testing.assert_close(model(input_ids=input_ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_weights_copy_has_no_place(tmp_path, module):
    """PEFT's copy of a tied head or embedding is refused, not lost; that of a head of its own is merged."""
    save_adapter(tiny(), tmp_path / "tied", modules_to_save=[module])
    save_adapter(tiny(), tmp_path / "tied LoRA", target_modules=[module], modules_to_save=None)
    for name in ("tied", "tied LoRA"):
        with pytest.raises(UserError, match=f"it holds a .*{module}.weight of its own, .*use the adapter with PEFT"):
            merge_adapter(base_model(tiny()), tmp_path / name)
    config = qwen2()
    save_adapter(config, tmp_path / "untied", modules_to_save=[module])
    merged = merge_adapter(base_model(config), tmp_path / "untied")
    expected = PeftModel.from_pretrained(base_model(config), tmp_path / "untied").merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def edit(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without(word: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name}


Q_PROJ = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {**tensors, Q_PROJ.format(9): torch.zeros(4, 128), "base_model.model.x": torch.zeros(1)},
            r"2 tensors do not fit the model: unexpected .*layers\.9\..*; unexpected .*x",
        ),
        (without("layers.1.self_attn.q_proj"), r"2 tensors do not fit .*missing .*q_proj\.lora_A.*; missing .*lora_B"),
        (without("linear_2.bias"), r"it lacks .*multi_modal_projector\.linear_2\.bias"),
    ],
    ids=["unexpected", "missing", "module"],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, message):
    """An adapter with a tensor too many or too few: all of them are named."""
    save_adapter(tiny(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError, match=message):
        merge_adapter(base_model(tiny()), tmp_path)


def test_another_models_adapter(tmp_path):
    """A language model of another width: the message names a tensor and both shapes."""
    save_adapter(tiny(), tmp_path)
    config = tiny()
    config.text_config.hidden_size = 64
    with pytest.raises(UserError, match=r"does not fit the model.*size mismatch.*\[4, 128\].*\[4, 64\]"):
        merge_adapter(base_model(config), tmp_path)


def test_no_adapter(tmp_path):
    with pytest.raises(UserError, match=r"--adapter .*: there is no adapter_config\.json in it"):
        merge_adapter(base_model(tiny()), tmp_path)


def test_an_adapter_without_weights(tmp_path):
    save_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--adapter .*: there is no adapter_model\.safetensors in it"):
        merge_adapter(base_model(tiny()), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3", "feedforward_modules": []}, "it is a IA3 adapter"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
    ids=["IA3", "PiSSA"],
)
def test_adapters_of_other_kinds(tmp_path, change, message):
    """Another method's adapter, and one that has changed the base's weights before training."""
    save_adapter(tiny(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        merge_adapter(base_model(tiny()), tmp_path)


def test_lora_with_biases_of_its_own(tmp_path):
    """LoRA's own biases are refused: of the base's layers not all have a bias to add them to."""
    save_adapter(qwen2(), tmp_path, lora_bias=True)
    with pytest.raises(UserError, match="lora_bias"):
        merge_adapter(base_model(qwen2()), tmp_path)
