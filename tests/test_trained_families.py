"""What a run leaves, family by family: an adapter that has learnt its sample, and that transformers and PEFT can use.

Tiny models of the real classes, with their real processors (tiny_families.py).
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_runs import run
from PIL import Image
from test_lengths import photo
from tiny_families import TRAINED, write_family

import eval as evaluation
from conversion import merge
from models.adapter import load_adapter
from models.generation import prompt_inputs
from models.loading import load_model, load_processor


pytestmark = pytest.mark.slow
FLAGS = "--max_steps 100 --learning_rate 1e-2 --lora_target_modules all-linear --lora_r 16 --lora_dropout 0"
FLAGS += " --per_device_train_batch_size 1 --max_seq_len 700 --max_image_pixels 10000 --mixed_precision no"
FLAGS += " --save_steps 0 --dataloader_num_workers 0 --eval_samples 1 --max_new_tokens 40"
QUESTION, ANSWER = "What is it?", "A grey square."
# Nothing of this project: what a reader of PEFT's documentation writes.
PLAIN = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

for folder in sys.argv[1:]:
    batch = torch.load(f"{folder}/batch.pt")
    auto_class = AutoModelForImageTextToText if "pixel_values" in batch else AutoModelForCausalLM
    base = auto_class.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = {"base": base(**batch).logits}
        logits["adapter"] = PeftModel.from_pretrained(base, f"{folder}/out").eval()(**batch).logits
        merged = auto_class.from_pretrained(f"{folder}/merged", dtype=torch.float32).eval()
        logits["merged"] = merged(**batch).logits
    torch.save(logits, f"{folder}/logits.pt")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@functools.cache
def trained(root: Path, name: str) -> Path:
    """A folder with a tiny `model`, a data set of one sample, `out`: an adapter that has learnt it, and the log."""
    folder = root / name
    write_family(name, folder / "model", with_weights=True)
    (folder / "0.png").write_bytes(photo(0))
    has_image = name != "llama"
    turns = [("human", f"<image>\n{QUESTION}" if has_image else QUESTION), ("gpt", ANSWER)]
    record = {"id": "0", "conversations": [{"from": sender, "value": text} for sender, text in turns]}
    (folder / "data.json").write_text(json.dumps([record | ({"image": "0.png"} if has_image else {})]))
    data = f"--dataset {folder / 'data.json'} --eval_dataset {folder / 'data.json'}"
    ended = run(f"{FLAGS} --model {folder / 'model'} {data} --output_dir {folder / 'out'}", folder / "logs")
    assert ended.code == 0, ended.err[-3000:]
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_it_repeats_the_sample_it_has_learnt(name: str, root: Path) -> None:
    """train.py says so, and eval.py with the saved adapter."""
    folder = trained(root, name)
    said = (folder / "logs/0.out").read_text()
    assert "exact match before training: 0.0%" in said and "exact match after training: 100.0%" in said
    config = evaluation.EvalConfig(
        adapter=str(folder / "out"),
        dataset=str(folder / "data.json"),
        mixed_precision="no",
        max_new_tokens=40,
        max_image_pixels=10000,
        dataloader_num_workers=0,
        output=str(folder / "answers.json"),
    )
    assert evaluation.main(config)["score"] == 1.0


@pytest.fixture(scope="module")
def plain(root: Path) -> Path:
    """Merge every adapter, and compute logits in a process that has never heard of this project."""
    folders = [trained(root, name) for name in TRAINED]
    for folder in folders:
        merge.main(merge.MergeConfig(adapter=str(folder / "out"), output=str(folder / "merged")))
        torch.save(dict(question(folder)), folder / "batch.pt")
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, folders)], cwd=root, check=True)
    return root


def question(folder: Path) -> dict[str, torch.Tensor]:
    processor = load_processor(str(folder / "model"))
    record = json.loads((folder / "data.json").read_text())[0]
    images = [Image.open(folder / record["image"])] if "image" in record else []
    return prompt_inputs(processor, [record["conversations"][:1]], [images])


@pytest.mark.parametrize("name", TRAINED)
def test_peft_alone_reads_it(name: str, plain: Path) -> None:
    """The logits of a question: by PEFT and transformers alone, of the adapter and of the merged model, and by this
    project. They are not the base model's."""
    folder = plain / name
    logits = torch.load(folder / "logits.pt")
    model = load_adapter(load_model(str(folder / "model"), torch.float32, "sdpa"), str(folder / "out")).eval()
    with torch.no_grad():
        expected = model(**torch.load(folder / "batch.pt")).logits
    for found in (logits["adapter"], logits["merged"]):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (logits["base"] - expected).abs().max() > 0.1
