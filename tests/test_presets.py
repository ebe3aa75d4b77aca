"""Presets: the published sizes, the models' own token ids and turn marks, and no download."""

from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.chat_template_utils import render_jinja_template

import train
from data.check import CheckConfig, find_long
from models.adapter import load_trained_processor
from models.loading import is_preset, is_text_only, load_config, load_processor
from models.presets import PRESETS
from training.config import TrainConfig
from utils import UserError


# Parameters as the models' pages on the Hugging Face hub state them (safetensors.total of api/models/<id>), but for
# PaliGemma 2, whose count is that of the loaded google/paligemma2-3b-mix-224.
PUBLISHED = {
    "qwen2.5-vl-3b": 3_754_622_976,  # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen2.5-vl-7b": 8_292_166_656,  # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen3-vl-2b": 2_127_532_032,  # Qwen/Qwen3-VL-2B-Instruct
    "qwen3-vl-4b": 4_437_815_808,  # Qwen/Qwen3-VL-4B-Instruct
    "qwen3-vl-8b": 8_767_123_696,  # Qwen/Qwen3-VL-8B-Instruct
    "qwen3.5-0.8b": 873_438_784,  # Qwen/Qwen3.5-0.8B, and so on
    "qwen3.5-2b": 2_274_069_824,
    "qwen3.5-4b": 4_659_865_088,
    "qwen3.5-9b": 9_653_104_368,
    "gemma-3-4b": 4_300_079_472,  # google/gemma-3-4b-it
    "gemma-4-e2b": 5_123_178_051,  # google/gemma-4-E2B-it
    "gemma-4-e4b": 7_996_156_490,  # google/gemma-4-E4B-it
    "paligemma2-3b": 3_032_242_416,
    "ministral-3-3b": 3_849_090_048,  # mistralai/Ministral-3-3B-Instruct-2512
    "smolvlm2-2.2b": 2_246_784_880,  # HuggingFaceTB/SmolVLM2-2.2B-Instruct
    "llava-1.5-7b": 7_063_427_072,  # llava-hf/llava-1.5-7b-hf
    "internvl3.5-2b": 2_348_347_392,  # OpenGVLab/InternVL3_5-2B-HF: 2.348 billion, no more digits are known
}
# Of an image of 640 x 480 pixels, by hand: cells of so many pixels, or what every image takes.
IMAGE_TOKENS = {
    "qwen2.5-vl": 23 * 17,  # of 28
    "qwen3": 20 * 15,  # of 32
    "gemma-3": 256,
    "gemma-4": 19 * 14,  # of 48, the most whose product is at most 280
    "paligemma2": 256,
    "ministral": 23 * 18,  # of 28
    "smolvlm2": (4 * 3 + 1) * 81,  # tiles and the whole
    "llava": 576,
    "internvl": (4 * 3 + 1) * 256,
}
END_OF_TURN = {
    "qwen": "<|im_end|>",
    "gemma-3": "<end_of_turn>",
    "gemma-4": "<turn|>",
    "paligemma2": "<eos>",
    "ministral": "</s>",
    "smolvlm2": "<end_of_utterance>",
    "llava": "</s>",
    "internvl": "<|im_end|>",
}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for another machine fails."""

    def refuse(*address: object) -> None:
        raise AssertionError(f"the network is asked for {address}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def of_family(name: str, values: dict) -> object:
    return next(value for family, value in values.items() if name.startswith(family))


def on_meta(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(load_config(name))


def unused_weights(name: str, model: PreTrainedModel) -> int:
    """Numbers that the published files hold and transformers' model has not as parameters."""
    decoder, width = model.get_decoder(), model.config.get_text_config().hidden_size
    if name.startswith("qwen3.5"):  # a layer of full attention that predicts the token after next, and what joins it
        layer = next(layer for layer in decoder.layers if hasattr(layer, "self_attn"))
        return sum(p.numel() for p in layer.parameters()) + 2 * width * width + 3 * width
    if name.startswith("gemma-4"):  # keys and values of layers that take those of others; a scale of each layer
        count = len(decoder.layers)
        for layer in decoder.layers[-model.config.text_config.num_kv_shared_layers :]:
            heads = model.config.text_config.num_key_value_heads
            count += 2 * heads * layer.self_attn.head_dim * width + layer.self_attn.head_dim
        return count
    return 0


def test_the_names_that_are_promised():
    """Each beside MGM's, with a published size."""
    assert PUBLISHED.keys() == {name for name in PRESETS if not name.startswith(("mgm", "tiny"))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name):
    """To the last one."""
    model = on_meta(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count + unused_weights(name, model) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_presets_processor(name, tmp_path):
    """An image of 640 x 480 takes the tokens worked out by hand, with the config's id; the label is the reply with the
    family's end of turn, at which the config ends an answer. Saved, it loads like a model's own."""
    config, processor = load_config(name), load_processor(name)
    special_tokens = processor.tokenizer.special_tokens_map
    texts, spans = render_jinja_template(
        [[QUESTION, ANSWER]],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **special_tokens,
    )
    (begin, end) = spans[0][0]
    end_of_turn = of_family(name, END_OF_TURN)
    assert texts[0][begin:end] == f"A cat.{end_of_turn}"
    ends = config.get_text_config().eos_token_id
    assert processor.tokenizer.convert_tokens_to_ids(end_of_turn) in (ends if isinstance(ends, list) else [ends])

    batch = processor(text=texts, images=[[Image.new("RGB", (640, 480))]], return_tensors="pt")
    assert (batch["input_ids"] == config.image_token_id).sum() == of_family(name, IMAGE_TOKENS)
    assert batch["input_ids"].max() < max(config.get_text_config().vocab_size, config.image_token_id + 1)
    prompt = render_jinja_template([[QUESTION]], chat_template=processor.chat_template, add_generation_prompt=True)
    assert texts[0].startswith(prompt[0][0])

    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert type(again) is type(processor) and again.chat_template == processor.chat_template
    assert again.tokenizer(texts)["input_ids"] == processor.tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("mgm", "tiny"))])
def test_mgms_presets_have_a_processor_too(name):
    """With the config's id for images and as many positions as the model gives features."""
    config, processor = load_config(name), load_processor(name)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    batch = processor(conversations=[turns], images=[[Image.new("RGB", (64, 48))]])
    assert (batch["input_ids"] == config.image_token_id).sum() == config.num_image_tokens
    end_of_turn = batch["labels"][batch["labels"] != -100][-1]
    assert end_of_turn == config.text_config.eos_token_id


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_reads_images(name):
    assert is_preset(name) and not is_text_only(load_config(name))


@pytest.mark.parametrize("name", ["mgm-2b", "qwen3-vl-2b"])
def test_a_preset_is_not_trained_nor_asked(name, tmp_path):
    """It has neither weights nor a tokenizer: one line instead of a run with random ones."""
    records = datasets.Dataset.from_dict({"conversations": []})
    runs = {
        "train.py": lambda: train.build_processor(TrainConfig(model=name, output_dir=str(tmp_path))),
        "eval.py": lambda: load_trained_processor(name, adapter=None),
        "data.check": lambda: find_long(records, CheckConfig(dataset="no.json", model=name)),
    }
    for script, run in runs.items():
        with pytest.raises(UserError, match=f"--model {name}: .* has neither weights nor a tokenizer"):
            run()
            pytest.fail(f"{script} went on")


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(UserError) as refused:
        load_config("vicuna")
    assert "no such folder, and the presets are tiny, mgm-1.5b" in str(refused.value)
    assert all(name in str(refused.value) for name in PRESETS)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("qwen3-vl-3b", "qwen3-vl-2b"), ("data/tiny_qwen3", "did you mean tiny_qwen3_vl?")],
)
def test_a_mistyped_name(name: str, remedy: str) -> None:
    """The names that are like it, of presets or of the folders beside it; nobody asks the hub."""
    with pytest.raises(UserError, match="no such folder, did you mean") as refused:
        load_config(name)
    assert remedy in str(refused.value)


def test_a_folder_comes_before_a_preset(tmp_path: Path, monkeypatch):
    (tmp_path / "gemma-3-4b").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no config.json in it"):
        load_config("gemma-3-4b")
