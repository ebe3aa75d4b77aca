"""MGM inside lmms-eval, where that is installed: the whole way on a small task of the demo's, against eval.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.demo import ensure_demo
from eval import EvalConfig, main


pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: docs/lmms_eval.md")

from lmms_eval.protocol import ChatMessages  # noqa: E402 (once it is known to be there)

from evaluation.lmms_eval_mgm import cut_at, to_prompt  # noqa: E402


ROOT = Path(__file__).parent.parent
TASK = """
task: mgm_demo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
metadata:
  - version: 0.0
"""
UTILS = """
from PIL import Image

def visual(doc): return [Image.open(doc["image"])]
def text(doc): return doc["question"]
"""


def write_task(folder: Path, num_questions: int) -> None:
    demo = ensure_demo()
    with open(folder / "demo.jsonl", "w") as file:
        for record in json.loads((demo / "validation.json").read_text())[:num_questions]:
            question, answer = (turn["value"] for turn in record["conversations"])
            row = {"image": str(demo / record["image"]), "question": question.removeprefix("<image>\n")}
            file.write(json.dumps(row | {"answer": answer}) + "\n")
    (folder / "mgm_demo.yaml").write_text(TASK.format(data=folder / "demo.jsonl"))
    (folder / "utils.py").write_text(UTILS)


def test_a_local_task(tmp_path, monkeypatch):
    write_task(tmp_path, 80)
    flags = (
        f"--model mgm --model_args pretrained=data/tiny_mgm --tasks mgm_demo --batch_size 8 --include_path {tmp_path}"
    )
    command = [sys.executable, "-m", "evaluation.lmms_eval_mgm", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    score = float(re.search(r"exact_match\|[^|]*\|\s*([\d.]+)", done.stdout)[1])

    monkeypatch.chdir(ROOT)
    expected = main(EvalConfig(limit=80, max_new_tokens=8, output=str(tmp_path / "eval.json")))["score"]
    assert 0 < expected < 1
    assert score == pytest.approx(expected, abs=1e-3)


def messages(*turns: tuple[str, list]) -> ChatMessages:
    """Of roles and contents: a text, an image, or a video's or audio's kind in a tuple."""

    def part(content) -> dict:
        if isinstance(content, str):
            return {"type": "text", "text": content}
        kind, url = ("image", content) if isinstance(content, Image.Image) else (content[0], "")
        return {"type": kind, "url": url}

    return ChatMessages(messages=[{"role": role, "content": list(map(part, contents))} for role, contents in turns])


def test_messages_become_turns():
    """Images where they stand, a placeholder in a text no image, the system's text in the first question."""
    image = Image.new("L", (4, 4))
    turns, images = to_prompt(
        messages(("system", ["Be brief."]), ("user", [image, "What is <image>?", image]), ("assistant", ["A cat."]))
    )
    assert turns == [
        {"from": "human", "value": "Be brief.\n<image>\nWhat is ?\n<image>"},
        {"from": "gpt", "value": "A cat."},
    ]
    assert [each.mode for each in images] == ["RGB", "RGB"]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_other_media_are_refused(kind):
    with pytest.raises(ValueError, match="images alone"):
        to_prompt(messages(("user", [(kind,), "What is it?"])))


def test_answers_are_cut():
    assert cut_at("a cat. Not a dog", ["\n", " Not"]) == "a cat." and cut_at("a cat", None) == "a cat"
    assert cut_at("a cat\nb", "\n\n") == "a cat\nb"  # blank ends would cut what templates begin with
