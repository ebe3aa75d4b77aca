"""A training step of every family, in all the ways in which it can be computed: the same loss and gradients.

Tiny models of the real classes, with batches by the real processors (tiny_families.py).
"""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from family_batches import make_batch
from peft.tuners.lora import LoraLayer
from tiny_families import (
    CHATML,
    FAMILIES,
    TEXT_FAMILIES,
    TIMM_FAMILIES,
    TORCHVISION_FAMILIES,
    VISION_FAMILIES,
    write_family,
)
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    Blip2Config,
    CLIPConfig,
    Florence2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedConfig,
    ProcessorMixin,
    T5Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_torchvision_available

from chat.text_processor import TextProcessor
from data.batching import is_padded_behind
from layers.chunked_loss import IGNORE_INDEX
from models.checkpointing import decoder_layers
from models.family import family_of, packs, reads_padding_mask
from models.loading import load_config, load_model, load_processor, num_decoder_layers
from models.parts import language_model, path_of, vision_tower
from models.processors import read_tokenizer
from step import StepConfig, build_model, check_model
from utils import UserError


def untied(config: PreTrainedConfig) -> PreTrainedConfig:
    """With a head of its own, which can be trained beside LoRA."""
    config.tie_word_embeddings = False
    return config


for each in ("cohere2", "granite"):
    FAMILIES[f"{each}_untied"] = lambda make=FAMILIES[each]: untied(make())
    TEXT_FAMILIES[f"{each}_untied"] = FAMILIES[f"{each}_untied"]
QUICK = """llava qwen2_5_vl qwen3_vl qwen3_5 gemma3 gemma4 gemma4_sharing smolvlm paligemma2 internvl mistral3 idefics3
llava_next mllama llama4 llama gemma2 granite cohere2 gpt2 qwen3 mixtral""".split()
EAGER = ("paligemma2", "gemma2", "gpt_oss", "mamba2")  # they have no other attention
WITHOUT_MLP = ("llama4", "lfm2_vl", "mamba2")  # their layers have a feed_forward or none
LORA_NAMES = {
    "deepseek_v3": ["q_b_proj", "kv_b_proj", "o_proj"],
    "kimi_k25": ["q_b_proj", "kv_b_proj", "o_proj"],
    "lfm2_vl": ["q_proj", "v_proj", "out_proj"],
    "phi3": ["qkv_proj", "o_proj"],
    "gpt2": ["c_attn"],
    "mamba2": ["in_proj"],
}
# Gemma 4 does not scale its products of queries and keys, so that rounding counts more in its softmax: in fp64 the
# logits of padded rows agree to 1e-14, as other families' do, but in fp32 only to 1e-5.
TOLERANCES = {name: 1e-3 for name in FAMILIES if name.startswith("gemma4")}
SAMPLES = [(20, [(100, 80)]), (9, [(60, 90)])]
Step = dict[str, torch.Tensor | None]


def families(chosen: list[str] | None = None, quick: list[str] = QUICK) -> pytest.MarkDecorator:
    """A test for each family; those that are not quick are slow."""
    names = [name for name in FAMILIES if name not in TIMM_FAMILIES and (chosen is None or name in chosen)]
    marks = [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marks)


def has_images(name: str) -> bool:
    """Whether the family's processor can make a batch with images here."""
    return name not in TEXT_FAMILIES and (is_torchvision_available() or name not in TORCHVISION_FAMILIES)


WITH_IMAGES = [name for name in FAMILIES if has_images(name)]


@pytest.fixture(scope="session", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this session's tiny models lie."""
    folder.root = tmp_path_factory.mktemp("families")
    yield folder.root
    folder.cache_clear()


@functools.cache
def folder(name: str) -> str:
    write_family(name, folder.root / name, with_weights=True)
    return str(folder.root / name)


def processor_of(name: str) -> ProcessorMixin:
    if has_images(name) or name in TEXT_FAMILIES:
        return load_processor(folder(name))
    processor = TextProcessor(read_tokenizer(folder(name)))
    processor.chat_template = CHATML
    return processor


def batch_of(name: str, samples: list = SAMPLES, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Two samples of different lengths, each with an image if the family's processor can be had."""
    samples = [(letters, sizes if has_images(name) else []) for letters, sizes in samples]
    return make_batch(processor_of(name), samples, padding_side)


def config_of(name: str, **flags) -> StepConfig:
    defaults = {"lora_target_modules": LORA_NAMES[name]} if name in LORA_NAMES else {}
    if name in EAGER:
        defaults["attn_implementation"] = "eager"
    defaults |= {"model": folder(name), "mixed_precision": "no", "lora_dropout": 0.0, "lora_r": 4}
    return StepConfig(**(defaults | flags))


def mixture(name: str) -> dict[str, int]:
    """Flags: a layer is checkpointed whole, the MLP of the next one alone, the last one not at all."""
    return {"checkpoint_num_layers": 1, "checkpoint_num_mlps": int(name not in WITHOUT_MLP)}


def model_of(name: str, **flags) -> nn.Module:
    """train.py's model in training mode, its adapter no longer zero, without dropout."""
    model = build_model(config_of(name, **flags), is_deepspeed=False).train()
    generator = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step_of(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs: int) -> Step:
    """The loss, and the gradients of everything trained."""
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    gradients = {path: parameter.grad for path, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach()} | gradients


def assert_same(found: Step, expected: Step, tolerance: float = 1e-5) -> None:
    """Every gradient within the tolerance of its norm, or of a hundredth of all gradients', if that is more."""
    assert found.keys() == expected.keys()
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert abs(found["loss"] / expected["loss"] - 1) < 1e-6
    whole = torch.stack([gradient.norm() for gradient in expected.values()][1:]).norm()
    for name, gradient in expected.items():
        scale = max(gradient.norm(), whole / 100)
        assert (found[name] - gradient).norm() <= tolerance * scale, name


@families()
def test_a_step_is_the_same_in_every_way(name):
    """LoRA: checkpointed, in part or not, MLPs in tiles or whole, with logits or without, with sdpa or eager."""
    batch = batch_of(name)
    expected = step_of(model_of(name, gradient_checkpointing=False, loss="full"), batch)
    assert {"loss"} < expected.keys() and any(gradient.any() for gradient in expected.values())
    ways = [{}, mixture(name), {"gradient_checkpointing": False}]
    if name not in EAGER:
        ways.append({"attn_implementation": "eager"})
    for flags in ways:
        assert_same(step_of(model_of(name, **flags), batch), expected, TOLERANCES.get(name, 1e-5))


@families()
def test_full_fine_tuning(name):
    """The language model and the head in full: the chunked loss gives all of them the gradients of the usual one."""
    batch = batch_of(name)
    expected = step_of(model_of(name, lora_r=0, loss="full", gradient_checkpointing=False), batch)
    for flags in ({}, mixture(name)):
        model = model_of(name, lora_r=0, **flags)
        assert_same(step_of(model, batch), expected, TOLERANCES.get(name, 1e-5))
    decoder, head = language_model(model), model.get_output_embeddings()
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for part in (decoder, head) for parameter in part.parameters()}


@families(["llava", "qwen3_vl", "llama4", "cohere2_untied", "granite_untied"], quick=["llava", "granite_untied"])
def test_a_head_trained_beside_lora(name):
    """PEFT wraps a copy of it: the copy computes the chunked loss, and gets the gradients of the usual one."""
    batch = batch_of(name)
    flags = {"trainable_modules": ["lm_head"]}
    expected = step_of(model_of(name, loss="full", gradient_checkpointing=False, **flags), batch)
    found = step_of(model_of(name, **flags), batch)
    assert_same(found, expected)
    assert sum("lm_head.modules_to_save" in key for key in found) == 1
    assert not any("original_module" in key for key in found)


@families(WITH_IMAGES, quick=["llava", "qwen3_vl", "gemma4", "smolvlm", "internvl", "mistral3", "mllama"])
def test_a_trained_tower(name):
    """LoRA on all linear layers of language model and tower: checkpointed or not. What gets no gradient is frozen."""
    flags = {"lora_target_modules": ["all-linear"], "lora_vision_tower": True}
    batch = batch_of(name)
    model = model_of(name, **flags)
    base = model.get_base_model()
    tower = vision_tower(base)
    found = step_of(model, batch)
    for others in ({"gradient_checkpointing": False}, mixture(name)):
        assert_same(found, step_of(model_of(name, **flags, **others), batch))
    path = path_of(base, tower)
    assert any(key.startswith(f"base_model.model.{path}.") for key in found)
    wrapped = {type(layer.get_base_layer()).__name__ for layer in model.modules() if isinstance(layer, LoraLayer)}
    assert wrapped == {"Linear"}
    layers = [layer for layer in tower.modules() if isinstance(layer, GradientCheckpointingLayer)]
    assert tower.training and all(layer.gradient_checkpointing for layer in layers)


@families(WITH_IMAGES)
def test_a_frozen_tower_costs_nothing(name):
    """It is in evaluation mode, builds no graph and is not recomputed; neither embeddings nor features need a
    gradient; and no LoRA is on it."""
    model = model_of(name)
    base = model.get_base_model()
    tower = vision_tower(base)
    assert not any(isinstance(module, LoraLayer) for module in tower.modules())
    outputs, num_calls = [], []
    for module in tower.modules():
        module.register_forward_hook(lambda _, args, output: outputs.append(output))
    tower.register_forward_hook(lambda *_: num_calls.append(1))
    base.get_input_embeddings().register_forward_hook(lambda _, args, output: outputs.append(output))
    layers = [layer for layer in tower.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer._gradient_checkpointing_func = None  # calling it would fail
    step_of(model, batch_of(name))
    tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
    assert len(tensors) > 10 and not any(tensor.requires_grad for tensor in tensors)
    assert not any(module.training for module in model.train().get_submodule(path_of(model, tower)).modules())
    assert len(num_calls) == 1 and decoder_layers(base)[0].training


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_routers_loss_reaches_checkpointed_layers(name, tmp_path):
    """Its logits leave a layer by a hook."""
    shutil.copytree(folder(name), tmp_path / name)
    path = tmp_path / name / "config.json"
    changes = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    batch = batch_of(name)
    ways = ({}, mixture(name), {"gradient_checkpointing": False})
    checkpointed, mixed, plain = (step_of(model_of(name, model=str(path.parent), **flags), batch) for flags in ways)
    assert_same(checkpointed, plain)
    assert_same(mixed, plain)
    without = step_of(model_of(name), batch)
    with pytest.raises(AssertionError):
        assert_same(checkpointed, without)


@families([name for name in FAMILIES if name != "gpt2"])  # its positions are a row's, whatever the mask says
def test_padding_makes_no_difference(name):
    """A short row padded on the left or on the right."""
    model = model_of(name)
    right, left = (step_of(model, batch_of(name, padding_side=side)) for side in ("right", "left"))
    assert_same(left, right, TOLERANCES.get(name, 1e-5))


PACKED = [name for name in FAMILIES if name not in TIMM_FAMILIES and packs(FAMILIES[name]())]
PACKED_SAMPLES = [(20, [(100, 80)]), (9, [(60, 90)]), (30, []), (14, [(50, 50), (70, 30)])]


def pack(batch: dict[str, torch.Tensor], rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The batch's samples, several to a row, as PackedCollator does it."""
    is_token = batch["attention_mask"].bool()
    packed = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    packed["position_ids"] = torch.arange(is_token.shape[1]).expand_as(is_token)
    for name in [name for name in packed if packed[name].shape[:2] == is_token.shape]:
        joined = [torch.cat([packed[name][sample][is_token[sample]] for sample in row]) for row in rows]
        fill = IGNORE_INDEX if name == "labels" else 0
        packed[name] = pad_sequence(joined, batch_first=True, padding_value=fill)
    return packed


@families(PACKED, quick=["llava", "internvl", "smolvlm", "mistral3", "llama", "gemma2", "gpt2", "mixtral"])
def test_packed_samples_are_trained_as_each_by_itself(name):
    """Four samples in one row, and in two of which one is padded, with a row for each; and a comparison that fails
    where they see each other."""
    batch = batch_of(name, PACKED_SAMPLES)
    batch["labels"][:, 0] = IGNORE_INDEX
    num_items = int((batch["labels"] != IGNORE_INDEX).sum())
    for attention in ("eager",) if name in EAGER else ("sdpa", "eager"):
        model = model_of(name, attn_implementation=attention)
        expected = step_of(model, batch, num_items_in_batch=num_items)
        for rows in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
            packed = pack(batch, rows)
            assert_same(step_of(model, packed, num_items_in_batch=num_items), expected)
        del packed["position_ids"]
        with pytest.raises(AssertionError):
            assert_same(step_of(model, packed, num_items_in_batch=num_items), expected)


@families(PACKED, quick=["llava", "internvl", "smolvlm", "mistral3", "llama", "gemma2", "gpt2", "mixtral"])
def test_padding_behind_the_tokens_needs_no_mask(name):
    """Where a token sees only what comes before it. (InternVL's processor pads before them; here they are moved.)"""
    model, batch = model_of(name), batch_of(name)
    tokens = batch["attention_mask"].bool()
    for key in [key for key in batch if batch[key].shape == tokens.shape]:
        batch[key] = torch.stack(
            [torch.cat([row[own], row[~own]]) for row, own in zip(batch[key], tokens, strict=True)]
        )
    assert not reads_padding_mask(model.config) and not tokens.all() and is_padded_behind(batch["attention_mask"])
    expected = step_of(model, batch)
    assert_same(step_of(model, {key: value for key, value in batch.items() if key != "attention_mask"}), expected)


def test_who_reads_the_mask_of_padding():
    """Families that see images in both directions or count positions by it, and a router's loss."""
    for name in ("gemma3", "paligemma2", "qwen3_vl", "gemma4"):
        assert reads_padding_mask(FAMILIES[name]())
    assert reads_padding_mask(MixtralConfig(output_router_logits=True)) and not reads_padding_mask(MixtralConfig())


def test_other_families_do_not_pack():
    """They are refused before training; among them those with positions in three dimensions."""
    refused = [name for name in FAMILIES if name not in PACKED and name not in TIMM_FAMILIES]
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma3", "gemma4", "paligemma2"} <= {*refused}
    for name in [name for name in refused if name in QUICK]:
        with pytest.raises(UserError, match=r"--packing true: .*, leave it out"):
            check_model(config_of(name, packing=True, max_seq_len=64))
    check_model(config_of("llava", packing=True, max_seq_len=64))


@torch.no_grad()
def greedy(model: nn.Module, inputs: dict[str, torch.Tensor], num_tokens: int, **flags: bool) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, **flags)
    return generated[:, inputs["input_ids"].shape[1] :]


@families()
def test_generation_with_a_cache_is_generation_without(name):
    """Greedy answers of a padded batch with images: from the cache, and by the whole row for every token."""
    model = model_of(name).eval()
    for parameter in model.parameters():  # otherwise it says its last word again
        parameter.data *= 3
    model.get_input_embeddings().weight.data *= 0.03
    batch = batch_of(name, padding_side="left")
    del batch["labels"]
    cached = greedy(model, batch, 8, use_cache=True)
    assert torch.equal(cached, greedy(model, batch, 8, use_cache=False))
    assert len(set(cached.flatten().tolist())) > 3


@families(["llava", "qwen3_5", "gemma4", "smolvlm", "llama4", "gpt2", "mixtral", "mamba2"])
def test_4_bit_layers_are_the_language_models(name):
    """All linear layers of the decoder but those whose weights kernels read, and no layer of a tower, a projector or
    the head."""
    model = load_model(folder(name), torch.float32, config_of(name).attn_implementation, "nf4")
    path = path_of(model, language_model(model))
    quantized = {p for p, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    plain = load_model(folder(name), torch.float32, config_of(name).attn_implementation)
    expected = {
        p
        for p, m in plain.get_submodule(path).named_modules(prefix=path)
        if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
        if p.rpartition(".")[2] not in family_of(plain.config).fused_layers
    }
    assert quantized == expected and quantized
    found = step_of(model_of(name, quantize="nf4"), batch_of(name))
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())


def test_gemma_3_is_not_trained_in_fp16():
    for name in ("gemma3", "gemma3_text"):
        config = config_of(name)
        config.mixed_precision = "fp16"  # the flag itself is refused on a CPU
        with pytest.raises(UserError, match=r"--mixed_precision fp16: .*gemma3.* overflow in it, choose no or bf16"):
            check_model(config)


def said(name: str, **flags) -> str:
    with pytest.raises(UserError) as error:
        build_model(config_of(name, **flags), is_deepspeed=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_layers_that_a_family_lacks():
    """One line that names what there is."""
    assert re.search(
        r"--lora_target_modules q_proj: GPT2Model has no such layer, choose c_attn, c_fc, c_proj or all-linear",
        said("gpt2", lora_target_modules=["q_proj"]),
    )
    assert "choose k_proj, o_proj, q_proj, v_proj or all-linear" in said(
        "mixtral", lora_target_modules=["gate_up_proj"]
    )
    assert "Mamba2Model has no such layer, choose in_proj or all-linear" in said(
        "mamba2", lora_target_modules=["out_proj"]
    )
    assert "LlamaForCausalLM has no vision tower" in said("llama", lora_vision_tower=True)
    assert re.search(
        r"--lora_vision_tower true, --lora_target_modules q_proj v_proj: Qwen3VLVisionModel has no such layer, choose "
        r"linear_fc1, linear_fc2, proj, qkv or all-linear",
        said("qwen3_vl", lora_target_modules=["q_proj", "v_proj"], lora_vision_tower=True),
    )
    with pytest.raises(UserError, match="--lora_vision_tower True: --lora_r 0 trains no adapter"):
        config_of("llava", lora_vision_tower=True, lora_r=0)


def test_a_model_without_sdpa_gets_eager_attention():
    model = build_model(config_of("gemma2", attn_implementation="sdpa"), is_deepspeed=False)
    assert model.config._attn_implementation == "eager"


def test_peft_takes_no_expert_and_no_tower_for_a_layer():
    """For some models with experts PEFT makes plain names of a pattern, and takes names of MLPs for the experts'."""
    for name in ("glm4v_moe", "deepseek_v3", "qwen3_next"):
        model = model_of(name, lora_target_modules=["all-linear"])
        wrapped = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
        path = path_of(model, language_model(model.get_base_model()))
        assert len(wrapped) >= 12 and all(each.startswith(path) for each in wrapped)
        assert {type(model.get_submodule(each).get_base_layer()) for each in wrapped} == {nn.Linear}
        assert "has no such layer, choose" in said(name, lora_target_modules=["down_proj"])


def test_layers_of_another_kind_are_named():
    """Qwen 3.5 has q_proj in every fourth layer alone."""
    lines: list[str] = []
    build_model(config_of("qwen3_5"), is_deepspeed=False, report=lines.append)
    assert len(lines) == 1 and lines[0].startswith("LoRA is on 1 of 4 layers: the others have ")
    assert "in_proj_qkv" in lines[0] and lines[0].endswith("see --lora_target_modules all-linear")
    lines.clear()
    build_model(config_of("qwen3_5", lora_target_modules=["all-linear"]), is_deepspeed=False, report=lines.append)
    assert lines == []


@families()
def test_which_layers_are_checkpointed(name):
    """The first of the language model, whatever layers a tower has before them; the config says how many there are."""
    layers = decoder_layers(model_of(name, **mixture(name)).get_base_model())
    assert len(layers) == num_decoder_layers(folder(name))
    num_others = len(layers) - 2
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, *[False] * num_others]
    assert [layer.recomputes_mlp for layer in layers] == [False, name not in WITHOUT_MLP, *[False] * num_others]


def test_layers_without_an_mlp():
    """Refused in one line."""
    with pytest.raises(UserError, match="--checkpoint_num_mlps 1: Mamba2Block has no `mlp`, or one that takes more"):
        model_of("mamba2", checkpoint_num_layers=1, checkpoint_num_mlps=1)


@pytest.mark.parametrize(("name", "num_tiled"), [("llama", 3), ("qwen3_vl", 3), ("mixtral", 0), ("gpt2", 0)])
def test_which_mlps_run_in_tiles(name, num_tiled):
    """Not experts, not what drops out (GPT-2), and none of a tower."""
    model = model_of(name)
    tiled = [path for path, module in model.named_modules() if path.endswith("mlp") and "forward" in vars(module)]
    assert len(tiled) == num_tiled and not any("visual" in path for path in tiled)


def test_what_a_familys_tower_does_not_use_is_frozen_and_named():
    lines: list[str] = []
    config = config_of("llava", trainable_modules=["vision_tower"])
    build_model(config, is_deepspeed=False, report=lines.append)
    assert lines[1] == (
        "Not trained, because the loss does not depend on it: model.vision_tower.encoder.layers.1, "
        "model.vision_tower.post_layernorm"
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (T5Config(), "has an encoder and a decoder for text, choose one with a decoder alone"),
        (Florence2Config(), "has an encoder and a decoder for text"),
        (Blip2Config(text_config=T5Config()), "has an encoder and a decoder for text"),
        (BertConfig(), "reads text in both directions, choose a causal language model"),
        (CLIPConfig(), "no vision-language model and no causal language model of the type clip"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_write_text_is_refused(config, problem, tmp_path):
    """In one line, by its config, before weights are read."""
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--model {tmp_path}: .*{problem}") as error:
        load_model(str(tmp_path), torch.float32, "sdpa")
    assert "\n" not in str(error.value)


def test_decoders_that_look_like_encoders_are_not_refused(tmp_path):
    """GPT-NeoX says is_decoder False and reads from left to right; BERT as a decoder does too."""
    for config in (GPTNeoXConfig(), BertConfig(is_decoder=True)):
        config.save_pretrained(tmp_path / config.model_type)
        assert load_config(str(tmp_path / config.model_type)).model_type == config.model_type


def test_an_embedding_in_fp32_beside_weights_in_bf16():
    """Its hidden states are fp32 in every layer. Under autocast a step is the same without checkpointing."""
    flags = {"trainable_modules": ["embed_tokens"], "mixed_precision": "bf16"}
    batch = batch_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (
            step_of(model_of("llama", gradient_checkpointing=checkpointing, **flags), batch)
            for checkpointing in (True, False)
        )
    assert_same(found, expected, 0.02)


def test_damaged_weights_are_refused(tmp_path):
    write_family("llama", tmp_path, with_weights=True)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded .*header"):
        load_model(str(tmp_path), torch.float32, "sdpa")


@pytest.mark.parametrize("change", [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"vocab_size": 100}], ids=str)
def test_a_config_with_wrong_values_is_refused(change, tmp_path):
    write_family("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match="cannot be loaded"), torch.device("meta"):
        load_model(str(tmp_path), torch.float32, "sdpa")


def test_weights_of_other_shapes_are_refused(tmp_path):
    write_family("llama", tmp_path, with_weights=True)
    config = load_config(str(tmp_path))
    config.intermediate_size += 8
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--model .*: the weights do not fit the config \(tensors of other shapes\)"):
        load_model(str(tmp_path), torch.float32, "sdpa")


def test_families_that_the_table_does_not_name():
    config = load_config(folder("qwen3_vl"))
    assert family_of(config) == type(family_of(config))()
    assert len(VISION_FAMILIES) >= 25
