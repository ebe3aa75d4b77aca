"""eval.py as users start it: answers, files, resuming, several processes, and bad input in one line."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_tasks import mmbench_row, write_captions, write_mmbench, write_textvqa

from data.demo import ensure_demo
from eval import EvalConfig, main
from evaluation import answer as answering
from models.generation import Answer, generate_answers, prompt_inputs
from models.loading import load_model, load_processor
from utils import parse_config, run_script


ROOT = Path(__file__).parent.parent
MODEL = "data/tiny_mgm"
KEYS = ["task", "metric", "score", "n", "seconds", "peak_allocated_bytes", "predictions"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def flags(folder: Path, dataset: Path | None, name: str = "out", **more) -> list[str]:
    words = ["--output", str(folder / f"{name}.json"), "--max_new_tokens", "12", "--dataloader_num_workers", "0"]
    words += ["--dataset", str(dataset), "--image_folder", "data/demo"] if dataset else []
    return words + [str(word) for key, value in more.items() for word in (f"--{key}", value)]


def run(*words: str) -> dict:
    return main(parse_config(EvalConfig, [*words]))


def answers_of(folder: Path, name: str = "out") -> dict[int, str]:
    lines = (folder / f"{name}.predictions.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    assert len({row["index"] for row in rows}) == len(rows), "a question is answered twice"
    return {row["index"]: row["prediction"] for row in rows}


def test_result(tmp_path):
    """The last line's keys; the file has the scores of each question type and of each question."""
    result = run(*flags(tmp_path, None, limit=10))
    assert list(result) == KEYS
    assert (result["task"], result["metric"], result["n"]) == ("demo", "exact_match", 10)
    written = json.loads((tmp_path / "out.json").read_text())
    assert {name: written[name] for name in KEYS} == result
    assert sum(group["n"] for group in written["by_type"].values()) == 10
    assert written["score"] == sum(item["value"] for item in written["scores"]) / 10
    assert len(answers_of(tmp_path)) == 10


def test_tensorboard(adapter, tmp_path):
    """Scores by type; a grid of the same questions whatever the run, so that runs can be laid side by side."""
    run(*flags(tmp_path, None, "first", limit=30))
    run(*flags(tmp_path, None, "second", limit=30, adapter=adapter))
    tables, grids = [], []
    for name in ("first", "second"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name))
        events.Reload()
        written = json.loads((tmp_path / f"{name}.json").read_text())
        scores = {"eval/exact_match": written["score"]}
        scores |= {f"eval/exact_match_{kind}": group["score"] for kind, group in written["by_type"].items()}
        assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == pytest.approx(scores)
        tables.append(events.Tensors("eval/samples/text_summary")[0].tensor_proto.string_val[0].decode())
        grids.append(Image.open(io.BytesIO(events.Images("eval/samples")[0].encoded_image_string)))
    ids = [[line.split("|")[1] for line in table.splitlines()] for table in tables]
    assert ids[0] == ids[1] and len(ids[0]) == 2 + 12
    assert tables[0] != tables[1]
    assert {grid.width for grid in grids} == {8 * 320}  # TensorBoard lays eight side by side


@pytest.mark.parametrize("end", ["<end_of_turn>", "<eos>"])
def test_generation_stops_at_both_ends(end, tiny_model):
    """A model that would say nothing but this token stops at once."""
    processor = load_processor(MODEL)
    model = load_model(MODEL, torch.float32, "sdpa").eval()
    token_id = processor.tokenizer.convert_tokens_to_ids(end)
    calls = []

    def only_the_end(module, args, output):
        calls.append(1)
        output = torch.full_like(output, -100.0)
        output[..., token_id] = 100.0
        return output

    model.lm_head.register_forward_hook(only_the_end)
    inputs = prompt_inputs(processor, [[{"from": "human", "value": "What?"}]] * 2, [[], []])
    assert generate_answers(model, processor, inputs, 8) == [Answer("", is_cut=False)] * 2
    assert len(calls) == 1


def test_an_interrupted_run_goes_on(mixed_dataset, tmp_path, monkeypatch):
    """What is written is not asked again; a line that was cut off is; the result is that of a run in one go."""
    expected = run(*flags(tmp_path, mixed_dataset, "whole"))
    asked = []

    def breaks(model, processor, inputs, max_new_tokens):
        asked.append(len(inputs["input_ids"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate_answers(model, processor, inputs, max_new_tokens)

    monkeypatch.setattr(answering, "generate_answers", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(*flags(tmp_path, mixed_dataset, batch_size=5))
    assert not (tmp_path / "out.json").exists()
    path = tmp_path / "out.predictions.jsonl"
    path.write_text(path.read_text()[:-10])

    asked.clear()
    asked += [0, 0, 0]  # past the break
    result = run(*flags(tmp_path, mixed_dataset, batch_size=7))
    assert sum(asked) == 24 - 9
    assert answers_of(tmp_path) == answers_of(tmp_path, "whole")
    assert result["score"] == expected["score"] and result["n"] == expected["n"]


def test_only_the_same_run_goes_on(mixed_dataset, tmp_path, capsys, monkeypatch):
    dataset = tmp_path / "dataset.json"
    dataset.write_text(mixed_dataset.read_text())
    run(*flags(tmp_path, dataset))
    line = fail(capsys, monkeypatch, *flags(tmp_path, dataset))
    assert "is there already" in line
    (tmp_path / "out.json").unlink()
    line = fail(capsys, monkeypatch, *flags(tmp_path, dataset, limit=3))
    assert "another limit" in line and "out.predictions.jsonl" in line
    assert len(answers_of(tmp_path)) == 24, "the file is left alone"
    records = json.loads(dataset.read_text())
    records[0]["conversations"][0]["value"] += " Really?"
    dataset.write_text(json.dumps(records))
    assert "answers to other questions" in fail(capsys, monkeypatch, *flags(tmp_path, dataset))


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A random adapter with a module trained in full beside it, as train.py saves them."""
    lora = LoraConfig(
        target_modules=r".*language.*q_proj", modules_to_save=["multi_modal_projector"], lora_dropout=0.5
    )
    model = get_peft_model(load_model(MODEL, torch.float32, "sdpa"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_other_weights_are_asked_anew(adapter, tmp_path, capsys, monkeypatch):
    """Answers of the adapter that was in the same folder before are not scored again."""
    run(*flags(tmp_path, None, limit=2, adapter=adapter))
    (tmp_path / "out.json").unlink()
    assert run(*flags(tmp_path, None, limit=2, adapter=adapter))["n"] == 2, "the same weights: nothing is asked again"
    (tmp_path / "out.json").unlink()
    os.utime(adapter / "adapter_model.safetensors", (1, 1))
    line = fail(capsys, monkeypatch, *flags(tmp_path, None, limit=2, adapter=adapter))
    assert "another weights_file" in line and "out.predictions.jsonl" in line


def test_adapter(adapter, tmp_path, capsys, monkeypatch):
    """An adapter changes the answers, brings its base along, and is refused on another base."""
    base = run(*flags(tmp_path, None, "base", limit=8))
    run(*flags(tmp_path, None, "adapted", limit=8, adapter=adapter))
    assert base["n"] == 8
    assert answers_of(tmp_path, "base") != answers_of(tmp_path, "adapted")

    line = fail(capsys, monkeypatch, *flags(tmp_path, None, adapter=adapter, model="mgm-2b"))
    assert "was trained on data/tiny_mgm, not on mgm-2b" in line
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    line = fail(capsys, monkeypatch, *flags(tmp_path, None, adapter=adapter))
    assert "does not fit the model" in line
    line = fail(capsys, monkeypatch, *flags(tmp_path, None, adapter=tmp_path))
    assert "there is no adapter_config.json" in line
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_500_samples_take_less_than_a_minute(tmp_path):
    """The script's own start included."""
    words = ["--dataset", str(ensure_demo() / "train.json"), "--limit", "500", "--output", str(tmp_path / "out.json")]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "eval.py", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 500
    assert time.perf_counter() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("task", ["textvqa", "mmbench", "caption"])
def test_benchmarks_end_to_end(task, tmp_path):
    """The script itself on tiny files in the real formats."""
    dataset = {
        "textvqa": lambda: write_textvqa(tmp_path),
        "mmbench": lambda: write_mmbench(tmp_path, [mmbench_row(), mmbench_row(242, "A", "blue")]),
        "caption": lambda: write_captions(tmp_path),
    }[task]()
    words = ["--task", task, "--dataset", dataset, "--max_new_tokens", "4", "--output", str(tmp_path / "out.json")]
    words += ["--circular", "true"] if task == "mmbench" else []
    done = subprocess.run([sys.executable, "eval.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == KEYS and result["n"] == {"textvqa": 2, "mmbench": 2, "caption": 3}[task]
    assert len(answers_of(tmp_path)) == {"textvqa": 2, "mmbench": 6, "caption": 3}[task]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_answer_as_one(config, adapter, mixed_dataset, tmp_path):
    """No question twice or lost, and the same answers; 23 questions cannot be shared out evenly."""
    words = flags(tmp_path, mixed_dataset, limit=23, batch_size=4, adapter=adapter)
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "eval.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 23
    run(*flags(tmp_path, mixed_dataset, "single", limit=23, batch_size=23, adapter=adapter))
    assert answers_of(tmp_path) == answers_of(tmp_path, "single")


def fail(capsys, monkeypatch, *words: str) -> str:
    """Run the script's main in this process; returns its one line on stderr after exit code 2."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_script(main, EvalConfig)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--task docvqa", ["--task docvqa", "textvqa"]),
        ("--task textvqa", ["--task textvqa needs --dataset"]),
        ("--task mmbench --dataset README.md", ["README.md"]),
        ("--dataset missing.json", ["missing.json", "no such file"]),
        ("--dataset pyproject.toml", ["pyproject.toml"]),
        ("--model no/such/folder", ["no/such/folder", "no such folder"]),
        ("--model tiny", ["--model tiny", "neither weights nor a tokenizer"]),
        ("--adapter missing", ["--adapter missing", "adapter_config.json"]),
        ("--batch_size 0", ["--batch_size 0", "at least 1"]),
        ("--limit -1", ["--limit -1"]),
        ("--output out.txt", ["--output out.txt", ".json"]),
        ("--circular true", ["--circular", "mmbench"]),
        ("--ocr_file words.json", ["--ocr_file", "textvqa"]),
        ("--compare one.json", ["--compare one.json", "two files"]),
        ("--compare missing.json README.md", ["missing.json", "no such file"]),
        ("--compare README.md README.md", ["README.md", "not a result"]),
    ],
)
def test_bad_flags(words, expected, capsys, monkeypatch, tmp_path):
    arguments = words.split()
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out.json")]
    line = fail(capsys, monkeypatch, *arguments)
    assert all(word in line for word in expected), line
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_breaks_when_it_is_opened(tmp_path, capsys, monkeypatch):
    dataset = write_textvqa(tmp_path)
    (tmp_path / "003a8ae2ef43b901.jpg").write_bytes(b"no picture")
    for num_workers in (0, 1):
        words = ["--task", "textvqa", "--dataset", dataset, "--dataloader_num_workers", str(num_workers)]
        line = fail(capsys, monkeypatch, *words, "--output", str(tmp_path / f"out{num_workers}.json"))
        assert "003a8ae2ef43b901.jpg" in line and "cannot be decoded" in line
