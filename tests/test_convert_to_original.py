"""The way back with an adapter, after full fine-tuning, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_files import LORA_TARGETS, all_tensors, assert_same, edit_tensors
from transformers import AutoTokenizer

from conversion.names import rename_ours
from conversion.original_files import ORIGINAL_FILES
from convert_mgm import ConvertConfig, main
from models.loading import load_model, load_processor
from utils import UserError


AUX = "model.vision_tower_aux."


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def original(request, reference_folder: Path, tmp_path: Path) -> Path:
    """The reference checkpoint in one type, without ConvNeXt, as released checkpoints are."""
    folder = tmp_path / "original"
    folder.mkdir()
    for path in (reference_folder / "tiny_mgm_original").iterdir():
        if path.suffix == ".safetensors":
            tensors = {k: v.to(request.param) for k, v in load_file(path).items() if not k.startswith(AUX)}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.name != "model.safetensors.index.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def converted(original: Path, reference_folder: Path, tmp_path: Path) -> Path:
    towers = reference_folder / "towers/OpenAI"
    config = ConvertConfig(
        from_original=str(original),
        output=str(tmp_path / "converted"),
        vision_tower=str(towers / "clip-vit-tiny-patch14-56"),
        vision_tower_aux=str(towers / "openclip-convnext-tiny-oracle"),
    )
    main(config)
    return tmp_path / "converted"


def hand_back(folder: Path, adapter: Path | None = None) -> Path:
    output = folder.with_name("back")
    main(ConvertConfig(to_original=str(folder), output=str(output), adapter=str(adapter) if adapter else None))
    return output


def train_adapter(converted: Path, folder: Path, **lora) -> Path:
    """An adapter as train.py saves it: its tensors in fp32, all random."""
    model = load_model(str(converted), next(iter(load_file(next(converted.glob("model-*"))).values())).dtype, "sdpa")
    modules = ["multi_modal_projector", "patch_info_mining"]
    config = LoraConfig(r=4, target_modules=LORA_TARGETS, modules_to_save=modules, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(model, config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) / 10
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["LoRA", "DoRA", "rsLoRA"])
def test_a_merged_adapter(original, converted, tmp_path, lora):
    """Every tensor handed back with PEFT's merge of the loaded model, renamed; a file that the adapter does not touch,
    and all beside the weights, with the original's."""
    adapter = train_adapter(converted, tmp_path / "adapter", **lora)
    back = hand_back(converted, adapter)
    held = all_tensors(original)
    dtype = held["model.norm.weight"].dtype
    merged = PeftModel.from_pretrained(load_model(str(converted), dtype, "sdpa"), adapter).merge_and_unload()
    expected = {rename_ours(name): tensor for name, tensor in merged.named_parameters()}
    tensors = all_tensors(back)
    assert_same(tensors, {name: tensor.data for name, tensor in expected.items() if name in held})
    assert tensors.keys() == held.keys()
    changed = {name for name in held if not torch.equal(held[name], tensors[name])}
    assert len([name for name in changed if "self_attn" in name]) == 2 * 3
    assert {name for name in held if "mm_projector" in name or "vlm_uni" in name} < changed
    assert not any("vision_tower" in name for name in changed)

    untouched = [p.name for p in original.glob("*.safetensors") if not changed & load_file(p).keys()]
    others = [path.name for path in original.iterdir() if path.suffix != ".safetensors" and path.name != "config.json"]
    assert untouched and others
    for name in untouched + others:
        assert (back / name).read_bytes() == (original / name).read_bytes(), name
    assert json.loads((back / "config.json").read_text()) == json.loads((original / "config.json").read_text())


def test_an_adapter_that_changes_a_tower(converted, tmp_path):
    """Biases trained everywhere: ConvNeXt's go along, and the config makes the original read them."""
    adapter = train_adapter(converted, tmp_path / "adapter", bias="all")
    back = hand_back(converted, adapter)
    bias = "model.vision_tower_aux.vision_stages.0.blocks.0.conv_dw.bias"
    merged = PeftModel.from_pretrained(load_model(str(converted), torch.float32, "sdpa"), adapter).merge_and_unload()
    expected = merged.model.vision_tower_aux.encoder.stages[0].layers[0].dwconv.bias
    tensors = all_tensors(back)
    assert torch.equal(tensors[bias], expected)
    assert len([name for name in tensors if name.startswith(AUX)]) > 20
    assert json.loads((back / "config.json").read_text())["optimize_vision_tower_aux"] is True


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_full_fine_tuning(original, converted, tmp_path, max_shard_size, dtype):
    """A folder that save_pretrained wrote, in one file or in shards, in either type: every tensor of the model under
    the original's name, a tokenizer that counts as the original's, the config with the type of the weights."""
    model, processor = load_model(str(converted), dtype, "sdpa"), load_processor(str(converted))
    for parameter in model.parameters():
        parameter.data += 1
    trained = tmp_path / "trained"
    model.save_pretrained(trained, max_shard_size=max_shard_size)
    processor.save_pretrained(trained)
    back = hand_back(trained)
    expected = {rename_ours(name): parameter.data for name, parameter in model.named_parameters()}
    assert_same(all_tensors(back), expected)
    assert (len(list(back.glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())

    config = json.loads((original / "config.json").read_text()) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    assert json.loads((back / "config.json").read_text()) == config
    text = "<start_of_turn>user\nWhat is it?<end_of_turn>\n"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (original, back)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    tokenizer_config = json.loads((back / "tokenizer_config.json").read_text())
    assert (
        tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    )  # the original's transformers know no other
    assert "<image>" not in (back / "tokenizer.json").read_text() + (back / "tokenizer_config.json").read_text()


def test_the_tokenizer_without_the_originals_files(original, converted):
    """A converted folder that has lost its copy of the original's files: nothing of `<image>` is handed back."""
    for path in (converted / ORIGINAL_FILES).iterdir():
        path.unlink()
    (converted / ORIGINAL_FILES).rmdir()
    assert "<image>" in (converted / "tokenizer.json").read_text()
    back = hand_back(converted)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (original, back)]
    assert len(tokenizers[0]) == len(tokenizers[1]) == 512
    assert tokenizers[0].all_special_tokens == tokenizers[1].all_special_tokens
    assert (back / "generation_config.json").is_file()
    merges = json.loads((back / "tokenizer.json").read_text())["model"].get("merges", [])
    assert all(isinstance(merge, str) for merge in merges)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("norm.weight") or "tower" in k},
            r"5 tensors do not fit the config: missing model\.language_model\.layers\.0\.input_layernorm\.weight; .*"
            r"missing model\.language_model\.norm\.weight",
        ),
        (
            lambda tensors: {
                k + ".old" if k == "model.language_model.norm.weight" else k: v for k, v in tensors.items()
            },
            r"2 tensors do not .*missing model\.language_model\.norm\.weight; unexpected .*norm\.weight\.old",
        ),
    ],
    ids=["missing", "unexpected"],
)
def test_tensors_that_do_not_fit_are_listed(converted, change, message):
    """Every one is named, and nothing is written."""
    edit_tensors(converted, change)
    with pytest.raises(UserError, match=message):
        hand_back(converted)
    assert not list(converted.parent.glob("back*"))


def test_an_adapter_that_does_not_fit(converted, tmp_path):
    """The error comes before anything is written."""
    adapter = train_adapter(converted, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.more": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 tensors do not fit the model: unexpected base_model.model.more"):
        hand_back(converted, adapter)
    assert not list(converted.parent.glob("back*"))


def test_other_folders(original, tmp_path):
    """The original's own folder is no input here."""
    with pytest.raises(UserError, match="it is no folder made by convert_mgm.py"):
        hand_back(original)


def test_a_failure_while_writing_leaves_nothing(converted, tmp_path, monkeypatch):
    """A disk that fills up after the weights: no folder under the output's name or beside it."""

    def full_disk(*args) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("convert_mgm.hand_back_files", full_disk)
    with pytest.raises(OSError, match="No space left"):
        hand_back(converted)
    assert not list(converted.parent.glob("back*"))


def test_the_aspect_ratio_that_was_trained_goes_back(original, converted, tmp_path):
    """What the adapter's own processor says, not its base's: the original's code shows the model the same pictures."""
    assert json.loads((original / "config.json").read_text())["image_aspect_ratio"] == "pad"
    adapter = train_adapter(converted, tmp_path / "adapter")
    processor = load_processor(str(converted))
    processor.image_aspect_ratio = "square"
    processor.save_pretrained(adapter)
    back = hand_back(converted, adapter)
    assert json.loads((back / "config.json").read_text())["image_aspect_ratio"] == "square"
