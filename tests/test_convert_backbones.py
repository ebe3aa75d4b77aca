"""Other language models than Gemma: from the original and back, and put together with two towers."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from conversion.names import rename_clip, rename_open_clip, rename_ours
from convert_mgm import ConvertConfig, main
from mgm.configuration_mgm import MGMConfig, tiny
from mgm.modeling_mgm import MGMForConditionalGeneration
from models.loading import load_config, load_model, load_processor
from utils import UserError


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
# The original's flat configs, as transformers 4.38 wrote them.
FLAT = {
    "mgm": {**SIZES, "rope_theta": 500000.0, "tie_word_embeddings": False, "architectures": ["MGMLlamaForCausalLM"]},
    "mgm_llama": {**SIZES, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mgm_mistral": {**SIZES, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
    "mgm_qwen2": {**SIZES, "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False},
    "mgm_gemma": {**SIZES, "rope_theta": 10000.0, "head_dim": 8, "hidden_act": "gelu"},
}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
BACKBONES = {
    "mgm": LlamaConfig(**SIZES, rope_parameters=ROPE),
    "mgm_llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    "mgm_mistral": MistralConfig(**SIZES, rope_parameters=ROPE | {"rope_theta": 1000000.0}, sliding_window=None),
    "mgm_qwen2": Qwen2Config(**SIZES, rope_parameters=ROPE | {"rope_theta": 1000000.0}, tie_word_embeddings=True),
    "mgm_gemma": GemmaConfig(**SIZES, head_dim=8, hidden_act="gelu_pytorch_tanh"),
}
TIED = ("mgm_qwen2", "mgm_gemma")


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights of a size at which every norm, bias and position matters."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    """Seven words and Llama's special tokens."""
    words = ["<unk>", "<s>", "</s>", "what", "is", "it", "cat"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)


def make_original(folder: Path, model_type: str, towers: dict[str, str]) -> MGMForConditionalGeneration:
    """A random MGM with that language model, and its checkpoint in the original's layout."""
    aux = tiny().vision_config_aux
    clip = CLIPVisionConfig.from_pretrained(towers["vision_tower"])
    model = randomize(
        MGMForConditionalGeneration(
            MGMConfig(text_config=BACKBONES[model_type], vision_config=clip, vision_config_aux=aux, image_token_id=7)
        )
    )
    tensors = {rename_ours(name): parameter.data for name, parameter in model.named_parameters()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": model_type,
        "mm_vision_tower": "clip",
        "mm_vision_tower_aux": "convnext",
        "image_size_aux": aux.image_size,
        **FLAT[model_type],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("model_type", FLAT)
def test_from_original_and_back(model_type, towers, tmp_path):
    """A random model written by hand in the original's layout, converted: its logits with the random model's, and
    what is handed back with what was written."""
    (tmp_path / "original").mkdir()
    model = make_original(tmp_path / "original", model_type, towers)
    names = load_file(tmp_path / "original/model.safetensors").keys()
    assert {"model.layers.1.mlp.down_proj.weight", "model.mm_projector.0.weight"} <= names
    assert ("lm_head.weight" in names) == (model_type not in TIED)
    assert ("model.layers.0.self_attn.k_proj.bias" in names) == (model_type == "mgm_qwen2")

    converted = str(tmp_path / "converted")
    main(
        ConvertConfig(from_original=str(tmp_path / "original"), output=converted, vision_tower=towers["vision_tower"])
    )
    loaded = load_model(converted, torch.float32, "sdpa")
    pixels = torch.randn(1, 3, 56, 56), torch.randn(1, 3, 64, 64)
    ids = torch.tensor([[1, 3, *[7] * 16, 5, 6, 2, 4, 3, 6]])
    inputs = {"input_ids": ids, "pixel_values": pixels[0], "pixel_values_aux": pixels[1]}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert load_processor(converted).image_token_id == loaded.config.image_token_id == 7
    assert loaded.generation_config.eos_token_id == [2]
    assert loaded.config.pad_token_id == load_processor(converted).tokenizer.pad_token_id is not None

    main(ConvertConfig(to_original=converted, output=str(tmp_path / "back")))
    written, back = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "back"))
    del written["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert written.keys() == back.keys() and all(torch.equal(written[name], back[name]) for name in written)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "original/config.json").read_text()
    )


def make_llm(folder: Path, model_type: str, layout: str = "single", dtype: torch.dtype = torch.float32) -> None:
    """A random language model as AutoModelForCausalLM saves it."""
    model = randomize(AutoModelForCausalLM.from_config(BACKBONES[model_type])).to(dtype)
    model.save_pretrained(folder, max_shard_size="8KB" if layout == "shards" else "1GB")
    if layout == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    save_tokenizer(folder)


def assemble(tmp_path: Path, towers: dict[str, str], name: str = "model") -> Path:
    output = tmp_path / name
    main(ConvertConfig(assemble=True, llm=str(tmp_path / "llm"), output=str(output), **towers))
    return output


@pytest.mark.parametrize("layout", ["single", "shards", "bin"])
@pytest.mark.parametrize("model_type", ["mgm", "mgm_mistral", "mgm_qwen2", "mgm_gemma"])
def test_assemble(model_type, layout, towers, tmp_path):
    """A language model and two towers: logits on text with the language model's own, tower tensors with the towers'
    files, and a step of training that reaches projector and mining."""
    make_llm(tmp_path / "llm", model_type, layout)
    output = assemble(tmp_path, towers)
    model, processor = load_model(str(output), torch.float32, "sdpa"), load_processor(str(output))
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.tensor([[1, 3, 4, 5, 6, 2, 3]])
    torch.testing.assert_close(model(input_ids=ids).logits, llm(input_ids=ids).logits)

    clip = load_file(Path(towers["vision_tower"]) / "model.safetensors")
    convnext = torch.load(Path(towers["vision_tower_aux"]) / "open_clip_pytorch_model.bin", weights_only=True)
    expected = {rename_clip(k): v for k, v in clip.items()} | {rename_open_clip(k): v for k, v in convnext.items()}
    expected.pop(None, None)
    parameters = dict(model.named_parameters())
    assert expected.keys() == {name for name in parameters if ".vision_tower" in name}
    assert all(torch.equal(parameters[name], tensor) for name, tensor in expected.items())

    turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "cat"}]
    batch = processor(conversations=[turns], images=[[Image.effect_noise((60, 40), 80).convert("RGB")]])
    assert batch["pixel_values_aux"].shape == (1, 3, 768, 768)
    model.train()(**batch).loss.backward()
    for name in ("patch_info_mining.key_proj.1.weight", "multi_modal_projector.linear_1.weight"):
        assert parameters[f"model.{name}"].grad.abs().sum() > 0, name


def test_the_connector_is_the_models_own_draw(towers, tmp_path):
    """Projector and mining: normal with the language model's initializer_range, biases 0, norms 1, in the language
    model's type; drawn alike every time, whatever was drawn before."""
    make_llm(tmp_path / "llm", "mgm", dtype=torch.bfloat16)
    torch.manual_seed(1)
    first = load_file(assemble(tmp_path, towers) / "projector_and_mining.safetensors")
    torch.manual_seed(2)
    second = load_file(assemble(tmp_path, towers, "again") / "projector_and_mining.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert len(first) == 16
    for name, tensor in first.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "proj.0.weight" in name:  # a LayerNorm's
            assert (tensor == 1).all(), name
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.15), name
    assert load_config(str(tmp_path / "model")).dtype == torch.bfloat16


def test_assembled_and_handed_back(towers, tmp_path):
    """A model put together, in the original's layout: its derived config and what is read from it again."""
    make_llm(tmp_path / "llm", "mgm")
    ours = assemble(tmp_path, towers)
    back, again = tmp_path / "back", tmp_path / "again"
    main(ConvertConfig(to_original=str(ours), output=str(back)))
    config = json.loads((back / "config.json").read_text())
    expected = {
        **{key: value for key, value in SIZES.items()},
        "model_type": "mgm",
        "architectures": ["MGMLlamaForCausalLM"],
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "image_aspect_ratio": "pad",
        "image_grid": 1,
        "image_global": False,
        "image_size_aux": 768,
        "mm_hidden_size": 32,
        "mm_hidden_size_aux": 120,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "optimize_vision_tower": False,
        "optimize_vision_tower_aux": False,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
    }
    assert {key: config.get(key, "missing") for key in expected} == expected
    assert "openai" in config["mm_vision_tower"].lower() and "openclip" in config["mm_vision_tower_aux"].lower()
    assert "rope_parameters" not in config and "dtype" not in config
    assert "<image>" not in AutoTokenizer.from_pretrained(back).get_vocab()

    main(ConvertConfig(from_original=str(back), output=str(again), **towers))
    models = [load_model(str(folder), torch.float32, "sdpa") for folder in (ours, again)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    ids = torch.tensor([[1, 3, 4, 5, 6]])
    torch.testing.assert_close(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)


@pytest.mark.parametrize("form", ["CLIPModel", "CLIPVisionModel", "bin"])
def test_forms_of_clip(form, towers, tmp_path):
    """CLIP with its text half, as transformers 5 saves the tower alone, and as .bin: the same vision tensors."""
    make_llm(tmp_path / "llm", "mgm")
    vision = CLIPVisionConfig.from_pretrained(towers["vision_tower"])
    if form == "CLIPVisionModel":
        model = randomize(CLIPVisionModel(vision))
    else:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8)))
    model.save_pretrained(tmp_path / "clip")
    if form == "bin":
        tensors = load_file(tmp_path / "clip/model.safetensors")
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        torch.save(tensors, tmp_path / "clip/pytorch_model.bin")
        (tmp_path / "clip/model.safetensors").unlink()
    output = assemble(tmp_path, towers | {"vision_tower": str(tmp_path / "clip")})
    expected = {k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}
    written = load_file(output / "vision_tower.safetensors")
    assert len(written) == 55
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name.removeprefix("model.vision_tower.")]), name


@pytest.mark.parametrize(("timm_name", "eps"), [("convnext_base", 1e-6), ("convnext_xxlarge", 1e-5)])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_forms_of_open_clip(timm_name, eps, suffix, towers, tmp_path):
    """Other depths and widths, .bin and safetensors: sizes from the tensors, the epsilon by timm's name."""
    make_llm(tmp_path / "llm", "mgm")
    folder = tmp_path / "convnext"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"timm_model_name": timm_name}}})
    )
    tensors = open_clip_tensors(widths=[6, 8, 10, 12], depths=[2, 1, 3, 1])
    if suffix == "bin":
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
        torch.save({"visual.trunk.stem.0.weight": torch.zeros(1)}, folder / "open_clip_pytorch_model.bin")
    output = assemble(tmp_path, towers | {"vision_tower_aux": str(folder)})
    tower = load_model(str(output), torch.float32, "sdpa").model.vision_tower_aux
    assert tower.config.hidden_sizes == [6, 8, 10, 12] and tower.config.depths == [2, 1, 3, 1]
    assert torch.equal(
        tower.encoder.stages[2].layers[2].layer_scale_parameter, tensors["visual.trunk.stages.2.blocks.2.gamma"]
    )
    assert tower.config.layer_norm_eps == eps


def open_clip_tensors(widths: list[int], depths: list[int]) -> dict[str, torch.Tensor]:
    """An OpenCLIP ConvNeXt's tensors by the names timm gives them, with some of what is not MGM's."""
    shapes = {"stem.0.weight": (widths[0], 3, 4, 4), "stem.0.bias": (widths[0],)}
    shapes |= {f"stem.1.{kind}": (widths[0],) for kind in ("weight", "bias")}
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i > 0:
            shapes |= {f"stages.{i}.downsample.0.{kind}": (widths[i - 1],) for kind in ("weight", "bias")}
            shapes[f"stages.{i}.downsample.1.weight"] = (width, widths[i - 1], 2, 2)
            shapes[f"stages.{i}.downsample.1.bias"] = (width,)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            shapes |= {f"{block}.{name}": (width,) for name in ("gamma", "norm.weight", "norm.bias", "conv_dw.bias")}
            shapes[f"{block}.conv_dw.weight"] = (width, 1, 7, 7)
            shapes[f"{block}.mlp.fc1.weight"], shapes[f"{block}.mlp.fc1.bias"] = (4 * width, width), (4 * width,)
            shapes[f"{block}.mlp.fc2.weight"], shapes[f"{block}.mlp.fc2.bias"] = (width, 4 * width), (width,)
    shapes["head.norm.weight"] = (widths[-1],)
    torch.manual_seed(0)
    tensors = {f"visual.trunk.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"visual.head.proj.weight": torch.zeros(4, 4), "logit_scale": torch.tensor(1.0)}


def edit_llm(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if k not in ("lm_head.weight", "model.norm.weight")},
            r"2 tensors do not fit the config: missing lm_head\.weight; missing model\.language_model\.norm\.weight",
        ),
        (
            lambda tensors: {**tensors, "score.weight": torch.zeros(1)},
            r"1 tensors do not fit the config: unexpected score\.weight",
        ),
    ],
    ids=["missing", "unexpected"],
)
def test_tensors_that_do_not_fit_are_listed(change, message, towers, tmp_path):
    """Of a language model's too, and nothing is written."""
    make_llm(tmp_path / "llm", "mgm")
    edit_llm(tmp_path / "llm", change)
    with pytest.raises(UserError, match=message):
        assemble(tmp_path, towers)
    assert {path.name for path in tmp_path.iterdir()} == {"llm"}


def test_another_language_model(towers, tmp_path):
    config: PreTrainedConfig = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    with pytest.raises(UserError, match="a gpt2 cannot be MGM's: choose llama, gemma, mistral, qwen2"):
        assemble(tmp_path, towers)


def test_towers_in_each_others_place(towers, tmp_path):
    """The folder whose files hold no such tower is named."""
    make_llm(tmp_path / "llm", "mgm")
    with pytest.raises(UserError, match=r"--vision_tower_aux .*clip-vit.*: its files hold no OpenCLIP ConvNeXt"):
        assemble(tmp_path, towers | {"vision_tower_aux": towers["vision_tower"]})
