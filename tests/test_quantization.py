"""4-bit weights: which layers have them, that training on them is right, what an adapter made there is good for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from conftest import assert_same_gradients, has_no_gradient
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn

from conversion.merge_adapter import changed_modules, merge_adapter
from data.worst_case import Row, worst_case_batch
from layers.quantization import dequantize, quantize_language_model, state_tensors
from mgm.configuration_mgm import tiny
from models.loading import load_model, load_processor
from models.lora import count_parameters, trained_parameters
from step import StepConfig, build_model
from utils import UserError


MODEL = "data/tiny_mgm"
LANGUAGE_MODEL = "base_model.model.model.language_model"
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]


def config(**flags: object) -> StepConfig:
    defaults = {"model": MODEL, "mixed_precision": "no", "max_seq_len": 40, "per_device_train_batch_size": 2}
    return StepConfig(**(defaults | {"lora_r": 4, "lora_dropout": 0.0} | flags))


def trained_at_random(model: nn.Module) -> nn.Module:
    """The adapter as if trained: LoRA's second factor begins with zeros, which would hide the first one's gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}


def batch_of(model: nn.Module, step_config: StepConfig, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random words after the image, and random images."""
    batch = worst_case_batch(load_processor(step_config.model), step_config, Row(step_config.max_seq_len, 1))
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 200, batch["labels"].shape, generator=generator)
    is_text = batch["labels"] != -100
    batch["labels"] = torch.where(is_text, words, batch["labels"])
    batch["input_ids"] = torch.where(is_text, words, batch["input_ids"])
    for name in ("pixel_values", "pixel_values_aux"):
        batch[name] = torch.randn(batch[name].shape, generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def test_a_folder_and_a_preset_are_quantized_alike():
    """transformers, while it reads a folder, and our own way for what is built: the same layers, bit for bit; all of
    the language model's linear layers and nothing else."""
    read = load_model(MODEL, torch.float32, "sdpa", "nf4")
    built = load_model(MODEL, torch.float32, "sdpa")
    quantize_language_model(built, "model.language_model", torch.float32)
    layers = quantized_layers(read)
    names = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    names += " mlp.gate_proj mlp.up_proj mlp.down_proj"
    assert layers.keys() == {f"model.language_model.layers.{i}.{name}" for i in range(4) for name in names.split()}
    assert quantized_layers(built).keys() == layers.keys()
    for (name, one), (_, other) in zip(read.named_parameters(), built.named_parameters(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    states = dict(state_tensors(built))
    assert len(states) == 5 * len(layers), "scales and their table, scales of the scales, their mean and a table"
    for name, tensor in state_tensors(read):
        assert torch.equal(tensor, states[name]), name
    assert {layer.compute_dtype for layer in [*layers.values(), *quantized_layers(built).values()]} == {torch.float32}


def dequantized(step_config: StepConfig, device: str) -> nn.Module:
    """The plain model with the weights that the 4-bit one computes with."""
    quantized = load_model(step_config.model, torch.float32, "sdpa", "nf4")
    weights = {
        path: dequantize(m.weight.data, m.weight.quant_state) for path, m in quantized_layers(quantized).items()
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        load = load_model

        def load_dequantized(*args: object) -> nn.Module:
            model = load(*args)
            for path, weight in weights.items():
                model.get_submodule(path).weight.data = weight.cpu()
            return model

        monkeypatch.setattr("step.load_model", load_dequantized)
        return build_model(step_config, is_deepspeed=False).train().to(device)


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_loss_and_gradients_are_those_of_the_dequantized_model(use_dora: bool, device: str):
    """A model with 4-bit weights, and one with the same weights dequantized: loss and every trained parameter's
    gradient in fp32, within 1e-5; also after an evaluation, for which bitsandbytes would rather pack anew."""
    flags = {"use_dora": use_dora, "lora_target_modules": ["all-linear"]}
    quantized = trained_at_random(build_model(config(quantize="nf4", **flags), is_deepspeed=False).train().to(device))
    plain = trained_at_random(dequantized(config(**flags), device))
    batch = batch_of(plain, config(), device)
    with torch.no_grad():
        quantized.eval()(**batch)
    loss, gradients = loss_and_gradients(quantized.train(), batch)
    expected_loss, expected = loss_and_gradients(plain, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert len(gradients) > 28 * 2
    assert all(gradient.any() for name, gradient in expected.items() if not has_no_gradient(name))
    assert_same_gradients(gradients, expected)
    unquantized = trained_at_random(build_model(config(**flags), is_deepspeed=False).train().to(device))
    assert abs(loss_and_gradients(unquantized, batch)[0] - expected_loss) > 1e-4, "4 bits make a difference"


def test_the_same_answers_in_training_and_evaluation_mode():
    """The weights are packed once: an evaluation computes what training computes."""
    model = build_model(config(quantize="nf4"), is_deepspeed=False)
    batch = batch_of(model, config())
    del batch["labels"]
    with torch.no_grad():
        expected = model.train()(**batch).logits
        torch.testing.assert_close(model.eval()(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_parameters_are_counted_as_weights():
    """Two weights share a byte; the counts of run.json are those of the same model without."""
    counts = [
        count_parameters(build_model(config(quantize=quantize), is_deepspeed=False)) for quantize in ("none", "nf4")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_trained_on_4_bits(use_dora: bool, tmp_path: Path):
    """Its base is the folder. It loads onto 4-bit weights, where it gives what it gave in training, and onto the
    folder's own, and convert_mgm.py merges it like PEFT."""
    model = trained_at_random(build_model(config(quantize="nf4", use_dora=use_dora), is_deepspeed=False)).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == MODEL
    batch = batch_of(model, config())
    with torch.no_grad():
        again = PeftModel.from_pretrained(load_model(MODEL, torch.float32, "sdpa", "nf4"), tmp_path).eval()
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)

    merged = merge_adapter(load_model(MODEL, torch.float32, "sdpa"), tmp_path)
    expected = PeftModel.from_pretrained(load_model(MODEL, torch.float32, "sdpa"), tmp_path).merge_and_unload()
    assert len(changed_modules(tmp_path)) > 4 * 3
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.state_dict().items())


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"--quantize nf4: bitsandbytes is missing, pip install -r requirements\.txt"):
        load_model(MODEL, torch.float32, "sdpa", "nf4")


def test_where_bitsandbytes_cannot_compute(monkeypatch):
    """A GPU for which it has no library: its pages of advice become one line."""

    def no_library(*args, **kwargs):
        raise RuntimeError("\n🚨 CUDA VERSION MISMATCH 🚨\nRequested CUDA version:          14.0\n\nThis means: ...")

    monkeypatch.setattr(functional, "quantize_4bit", no_library)
    with pytest.raises(UserError, match=r"--quantize nf4: .*CUDA VERSION MISMATCH.*python -m bitsandbytes") as error:
        load_model("tiny", torch.float32, "sdpa", "nf4")
    assert "\n" not in str(error.value)


def test_building_leaves_nothing_behind():
    """A model on `meta` is quantized there, and the next one on the CPU is none the worse for it."""
    with torch.device("meta"):
        model = build_model(config(model="tiny", quantize="nf4"), is_deepspeed=False)
    assert all(tensor.is_meta for _, tensor in state_tensors(model))
    assert {tensor.device.type for tensor in functional.name2qmap.values()} == {"cpu"}
    assert tiny().text_config.num_hidden_layers * 7 == len(quantized_layers(model))
    # PEFT's own layer for 4 bits: it can be merged.
    assert isinstance(model.get_submodule(f"{LANGUAGE_MODEL}.layers.0.self_attn.q_proj"), LoraLinear4bit)
