"""A chat template whose replies do not end where generation stops is found before training."""

import json
import shutil
from pathlib import Path

import pytest
from test_chat_templates import CONVERSATION, EXPECTED, OWN_TEMPLATES, make_processor, make_tokenizer

import train
from conversion.our_folder import build_generation_config
from data.make_demo import ensure_demo
from data.turn_ends import missing_turn_end, stop_token_ids
from processing_mgm import MGMProcessor
from utils import UserError, load_processor


RECORD = {"id": "7", "conversations": CONVERSATION}
ROOT = Path(__file__).parent.parent


def saved(processor: MGMProcessor, folder: Path) -> str:
    """A model's folder as far as the check looks at it."""
    build_generation_config(processor.tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", EXPECTED)
def test_every_family_ends_its_turns(family, tmp_path):
    """Our templates, and the tokenizers' own."""
    for own_template in filter(None, [None, OWN_TEMPLATES.get(family)]):
        processor = make_processor(make_tokenizer(family, own_template))
        assert missing_turn_end(saved(processor, tmp_path), processor, RECORD) is None


def test_the_tiny_model_ends_its_turns(reference_model_folder, processor, tmp_path):
    """So does a converted checkpoint, and a model without generation_config.json, by its config.json."""
    assert missing_turn_end("data/tiny_mgm", load_processor("data/tiny_mgm"), RECORD) is None
    assert missing_turn_end(str(reference_model_folder), processor, RECORD) is None
    shutil.copy(ROOT / "data/tiny_mgm/config.json", tmp_path)
    assert stop_token_ids(str(tmp_path), processor) == {1}
    assert missing_turn_end(str(tmp_path), load_processor("data/tiny_mgm"), RECORD) is None


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ m.content }};", "'A cat.;'"),  # no end at all
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", "'A cat.'"),  # one that is not learned
        ("{{ m.content }}{{ '<|im_end|>' if not loop.last }}", "'A cat.'"),  # none after the last reply
        ("{{ m.content }}<|im_start|>", "'A cat.<|im_start|>'"),  # a token, but not one to stop at
    ],
)
def test_a_template_without_an_end(template, shown, tmp_path):
    """The line shows what would be learned, and where generation stops."""
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %}" + template
    processor = make_processor(make_tokenizer("chatml", template + "{% endif %}{% endfor %}"))
    problem = missing_turn_end(saved(processor, tmp_path), processor, RECORD)
    assert f"of record 7 it would learn {shown}" in problem and "<|im_end|>" in problem and "\n" not in problem


def test_an_empty_reply_without_an_end(tmp_path):
    processor = make_processor(make_tokenizer("chatml", "{% for m in messages %}{{ m.content }}{% endfor %}"))
    turns = [CONVERSATION[0], {"from": "gpt", "value": ""}]
    assert missing_turn_end(saved(processor, tmp_path), processor, {"id": "7", "conversations": turns})


def test_training_refuses_it_unless_it_is_meant(tmp_path, capfd):
    """Before anything is measured; with the flag it is a warning."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data/tiny_mgm", model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("{{ '<end_of_turn>\n' + eos_token }}", ""))
    flags = {"model": str(model), "output_dir": str(tmp_path / "out"), "eval_samples": 0}
    flags |= {"dataset": str(ensure_demo() / "validation.json")}
    with pytest.raises(UserError, match="no end of turn .* give --allow_missing_end_of_turn"):
        config = train.TrainConfig(**flags)
        train.build_datasets(config, load_processor(str(model)))
    config = train.TrainConfig(**flags, allow_missing_end_of_turn=True)
    train.build_datasets(config, load_processor(str(model)))
    assert "warning: --model" in capfd.readouterr().err
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
