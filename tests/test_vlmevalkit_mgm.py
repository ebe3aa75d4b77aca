"""MGM inside VLMEvalKit, where that is installed; elsewhere inside a stand-in for the part of it that a model meets.

VLMEvalKit is not on PyPI. The stand-in does what docs/en/Development.md and vlmeval/vlm/base.py there ask and give:
`generate` hands a list of typed parts to `generate_inner`, and images of a data set's row are dumped to files.
"""

import importlib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from PIL import Image
from test_tasks import mmbench_row, write_mmbench

from data.demo import ensure_demo
from eval import EvalConfig
from eval import main as evaluate
from evaluation.tasks import mmbench
from utils import UserError


ROOT = Path(__file__).parent.parent
MCQ, VQA = "MMBench_DEV_EN", "TextVQA_VAL"


class BaseModel:
    """As in vlmeval/vlm/base.py."""

    INTERLEAVE = False
    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def set_dump_image(self, function) -> None:
        self.dump_image_func = function

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        """A list of strings is taken too: those that name a file are images."""
        if all(isinstance(part, str) for part in message):
            kinds = ["image" if Path(part).is_file() else "text" for part in message]
            message = [{"type": kind, "value": part} for kind, part in zip(kinds, message, strict=True)]
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


@pytest.fixture(scope="module")
def vlmevalkit_mgm():
    with pytest.MonkeyPatch.context() as monkeypatch:
        if find_spec("vlmeval") is None:
            parts = {
                "vlmeval": {},
                "vlmeval.smp": {"cn_string": lambda text: re.search("[\u4e00-\u9fff]", text) is not None},
                "vlmeval.dataset": {"DATASET_TYPE": {MCQ: "MCQ", VQA: "VQA"}.get},
                "vlmeval.vlm": {},
                "vlmeval.vlm.base": {"BaseModel": BaseModel},
            }
            for name, content in parts.items():
                module = ModuleType(name)
                vars(module).update(content)
                monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "evaluation.vlmevalkit_mgm", raising=False)
        yield importlib.import_module("evaluation.vlmevalkit_mgm")
        monkeypatch.delitem(sys.modules, "evaluation.vlmevalkit_mgm", raising=False)


@pytest.fixture(scope="module")
def model(vlmevalkit_mgm):
    return vlmevalkit_mgm.MGM(str(ROOT / "data/tiny_mgm"), max_new_tokens=8)


def test_answers_are_those_of_eval(model, tmp_path, monkeypatch):
    """The demo's first questions, each a path and a text, against eval.py's answers in batches."""
    monkeypatch.chdir(ROOT)
    output = tmp_path / "eval.json"
    result = evaluate(EvalConfig(limit=24, max_new_tokens=8, output=str(output)))
    records = pd.read_json(ensure_demo() / "validation.json").head(24)
    answers = []
    for image, turns in zip(records["image"], records["conversations"], strict=True):
        message = [str(ensure_demo() / image), turns[0]["value"].removeprefix("<image>\n")]
        answers.append(model.generate(message, VQA))
    lines = map(json.loads, Path(result["predictions"]).read_text().splitlines()[1:])
    assert answers == [line["prediction"] for line in sorted(lines, key=lambda line: line["index"])]


def test_multiple_choice_has_the_words_of_eval(model, tmp_path):
    """The prompt of a row is that of `eval.py --task mmbench`, after its image."""
    path = write_mmbench(tmp_path, [mmbench_row()])
    (question,) = mmbench.load(path).questions
    line = pd.read_table(path, dtype=str).iloc[0]
    model.set_dump_image(lambda line: [f"{line['index']}.jpg"])
    assert model.use_custom_prompt(MCQ) and not model.use_custom_prompt(VQA) and not model.use_custom_prompt(None)
    assert model.build_prompt(line, MCQ) == [
        {"type": "image", "value": "241.jpg"},
        {"type": "text", "value": question.prompt},
    ]
    line["question"] = "这是什么?"
    assert model.build_prompt(line, MCQ)[-1]["value"].endswith("\n请直接回答选项字母。")


def test_images_come_before_the_text(model, tmp_path, monkeypatch):
    """Two images around a text, whose own `<image>` is no image; and no image at all."""
    seen = []
    module = sys.modules[type(model).__module__]
    original = module.prompt_inputs
    monkeypatch.setattr(module, "prompt_inputs", lambda *args: seen.append(args[1:]) or original(*args))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    parts = [("image", str(tmp_path / "a.png")), ("text", "Is <image> like"), ("image", str(tmp_path / "b.png"))]
    model.generate([{"type": kind, "value": value} for kind, value in parts])
    assert isinstance(model.generate([{"type": "text", "value": "What?"}]), str)
    assert [turns[0][0]["value"] for turns, _ in seen] == ["<image>\n<image>\nIs  like", "What?"]
    assert [len(images[0]) for _, images in seen] == [2, 0]


def test_random_weights_are_refused(vlmevalkit_mgm):
    with pytest.raises(UserError, match="mgm-2b"):
        vlmevalkit_mgm.MGM("mgm-2b")
