"""Runs disturbed by what is no number and by samples that cannot be had: nothing that is good is lost."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked_runs import Fault, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.batching import TrainCollator, UpdateBatchSampler
from data.dataset import open_dataset
from data.demo import ensure_demo
from data.lengths import column_values, measure_lengths
from models.loading import load_model, load_processor
from training import faults
from training.faults import find_launcher
from utils import name_some


FORWARD = "mgm.modeling_mgm.MGMForConditionalGeneration.forward"
FLAGS = "--save_steps 1 --save_total_limit 0 --logging_steps 1 --eval_samples 0 --dataloader_num_workers 0"
FLAGS += " --learning_rate 4e-3"
FLAGS += (
    " --no_rehearse --max_steps 6 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --lora_dropout 0"
)
RESUME = " --resume_from_checkpoint latest"


def make_data(folder: Path, num_records: int = 24) -> str:
    """Records with an image file each, all their own; returns the flags."""
    demo = ensure_demo()
    folder.mkdir()
    records = json.loads((demo / "train.json").read_text())[:num_records]
    for i, record in enumerate(records):
        shutil.copy(demo / record["image"], folder / f"{i}.png")
        record |= {"id": f"sample-{i}", "image": f"{i}.png"}
    (folder / "records.json").write_text(json.dumps(records))
    return f" --dataset {folder / 'records.json'}"


@pytest.fixture
def data_flags(tmp_path: Path) -> str:
    return make_data(tmp_path / "data")


def curve(output_dir: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(output_dir / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def optimizer_steps(checkpoint: Path) -> set[float]:
    tensors = load_file(checkpoint / "trained-00001.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return {float(tensor) for name, tensor in tensors.items() if name.startswith("step/")}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("action", ["nan", "infinite gradient"])
def test_one_bad_update_is_skipped(config: str, action: str, data_flags: str, tmp_path: Path) -> None:
    """Step and samples are named, nothing is changed by it, the schedule waits, and the run goes on."""
    output_dir = tmp_path / "out"
    # Where DeepSpeed by itself would not look, and where accelerate would leave autocast out.
    precision = " --mixed_precision bf16" if config in ("zero2", "fsdp2") else ""
    fault = Fault(FORWARD, 6, action)  # the second micro-batch of update 3
    ended = run(f"{FLAGS}{data_flags}{precision} --output_dir {output_dir}", tmp_path, config, faults=(fault,))
    assert ended.code == 0, ended.err[-3000:]
    [line] = [line for line in ended.err.splitlines() if "is skipped" in line]
    assert "step 3 is skipped" in line and line.count("sample-") == (2 if action == "nan" else 4)
    assert ("the loss is nan" if action == "nan" else "the gradients' norm is") in line
    assert ended.result["skipped_updates"] == 1 and np.isfinite(ended.result["train_loss"])
    assert curve(output_dir, "train/skipped_updates")[-1] == 1
    assert not (output_dir / "checkpoint-3").exists(), "not while updates are skipped"
    assert optimizer_steps(output_dir / "checkpoint-2") == {2} and optimizer_steps(output_dir / "checkpoint-4") == {3}
    assert json.loads((output_dir / "checkpoint-4/state.json").read_text())["scheduler"]["last_epoch"] == 3


@pytest.mark.slow
def test_too_many_bad_updates(data_flags: str, tmp_path: Path) -> None:
    """The run ends; its last checkpoint is from before them, and resumed from there it is as if nothing had been."""
    flags = f"{FLAGS}{data_flags} --max_nonfinite_updates 3"
    fault = Fault(FORWARD, 5, "nan", times=99)
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path, faults=(fault,))
    assert ended.code == 2 and "3 updates in a row up to step 5" in ended.error
    checkpoints = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-1", "checkpoint-2"}
    assert run(f"{flags} --output_dir {tmp_path / 'out'}{RESUME}", tmp_path).code == 0
    assert run(f"{flags} --output_dir {tmp_path / 'undisturbed'}", tmp_path).code == 0
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_bad_image_stops_the_run(data_flags: str, tmp_path: Path) -> None:
    """By default. What was trained is kept; with the image repaired the run ends where it would have ended."""
    image, good = tmp_path / "data/5.png", (tmp_path / "data/5.png").read_bytes()
    image.write_bytes(good[: len(good) // 2])
    flags = f"{FLAGS}{data_flags} --save_steps 50 --output_dir"
    order = UpdateBatchSampler(np.ones(24), 2, 2, 1, seed=42).updates()
    step = next(number for number, update in enumerate(order) if 5 in update)
    assert step >= 1, "not in the first update"
    ended = run(f"{flags} {tmp_path / 'out'}", tmp_path)
    assert ended.code == 2 and "sample-5" in ended.error and "5.png" in ended.error and "truncated" in ended.error
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    image.write_bytes(good)
    assert run(f"{flags} {tmp_path / 'out'}{RESUME}", tmp_path).code == 0
    assert run(f"{flags} {tmp_path / 'undisturbed'}", tmp_path).code == 0
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert adapters[0] == adapters[1]


def damage(folder: Path) -> set[str]:
    """Two images that only a decoder finds bad, one that is missing, one record in no format. Returns all names."""
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:150])
    (folder / "10.png").write_text("no picture")
    (folder / "17.png").unlink()
    records = json.loads((folder / "records.json").read_text())
    records[20]["conversations"] = "none"
    (folder / "records.json").write_text(json.dumps(records))
    return {f"sample-{i}" for i in (3, 10, 17, 20)}


def mean_loss(dataset_path: Path, bad: set[str]) -> float:
    """The first update's loss by hand: the mean over the label tokens of its good samples, at the model's start."""
    processor, model = load_processor("data/tiny_mgm"), load_model("data/tiny_mgm", torch.float32, "sdpa").eval()
    dataset = open_dataset(dataset_path, skips_bad=True)
    dataset.records = measure_lengths(dataset.records, processor, 2048)
    sampler = UpdateBatchSampler(column_values(dataset.records, "num_label_tokens"), 2, 2, 1, seed=42)
    loss_sum = num_label_tokens = num_bad = 0
    for index in sampler.updates()[0]:
        sample = dataset[index]
        if sample["id"] in bad:
            num_bad += 1
            continue
        batch = TrainCollator(processor, 2048)([sample])
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            loss_sum += float(model(**batch).loss) * count
        num_label_tokens += count
    assert num_bad == 1, "else nothing is tested"
    return loss_sum / num_label_tokens


@pytest.mark.slow
def test_skipping_keeps_the_mean(data_flags: str, tmp_path: Path) -> None:
    """Bad samples leave no trace in any update's loss, on one process or two; they are named once and counted."""
    bad = damage(tmp_path / "data")
    flags = f"{FLAGS}{data_flags} --on_bad_sample skip --max_bad_fraction 0.5 --max_steps 8 --seed 42"
    curves = {}
    for config, num_processes in (("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 2)):
        output_dir = tmp_path / f"{config}-{num_processes}"
        sizes = " --per_device_train_batch_size 1" if num_processes == 2 else ""
        logs = tmp_path / "logs" / config
        ended = run(f"{flags}{sizes} --output_dir {output_dir}", logs, config, num_processes)
        assert ended.code == 0, ended.err[-3000:]
        lines = "".join((logs / f"{rank}.err").read_text() for rank in range(num_processes))
        named = [line for line in lines.splitlines() if line.startswith("warning: left out: ")]
        assert len(named) == len(bad), named
        for name in bad:
            assert any(name in line for line in named), name
        assert json.loads((output_dir / "run.json").read_text())["bad_samples"] == len(bad)
        assert curve(output_dir, "data/bad_samples")[-1] == len(bad)
        curves[config] = curve(output_dir, "train/loss")
    assert curves["single"][0] == pytest.approx(mean_loss(tmp_path / "data/records.json", bad), abs=1e-5)
    for config in ("ddp", "fsdp2", "zero3"):
        assert curves[config] == pytest.approx(curves["single"], abs=1e-4), config


@pytest.mark.slow
def test_skipping_in_packed_rows(data_flags: str, tmp_path: Path) -> None:
    """A bad sample leaves its row to the others: losses are those of a data set with it left out by hand."""
    bad = damage(tmp_path / "data")
    flags = f"{FLAGS}{data_flags} --packing --max_seq_len 128 --max_steps 1 --gradient_accumulation_steps 8"
    flags += " --on_bad_sample skip --max_bad_fraction 0.5"
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.result["bad_samples"] == len(bad)
    path = tmp_path / "data/records.json"
    path.write_text(json.dumps([record for record in json.loads(path.read_text()) if record["id"] not in bad]))
    ended = run(f"{flags} --output_dir {tmp_path / 'by-hand'}", tmp_path)
    assert ended.code == 0 and ended.result["bad_samples"] == 0
    losses = [curve(tmp_path / name, "train/loss")[0] for name in ("out", "by-hand")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5), "one update has all rows"


@pytest.mark.slow
def test_too_many_bad_samples(data_flags: str, tmp_path: Path) -> None:
    """More than --max_bad_fraction ends the run: at once where records show it, else when enough have been met."""
    for i in range(12):
        (tmp_path / f"data/{i}.png").write_text("no picture")
    flags = f"{FLAGS}{data_flags} --on_bad_sample skip --output_dir {tmp_path / 'out'} --max_bad_fraction"
    ended = run(f"{flags} 0.2", tmp_path)
    assert ended.code == 2 and "of 24 samples cannot be used, more than --max_bad_fraction 0.2" in ended.error
    for i in range(12):
        (tmp_path / f"data/{i}.png").unlink()
    ended = run(f"{flags} 0.2 --overwrite_output_dir", tmp_path)
    assert ended.code == 2 and "12 of 24 samples" in ended.error


@pytest.mark.slow
def test_samples_that_share_an_id_are_counted_each(data_flags: str, tmp_path: Path) -> None:
    """All records have one id, and half of the images are bad: too many, as with ids of their own."""
    path = tmp_path / "data/records.json"
    path.write_text(json.dumps([record | {"id": "same"} for record in json.loads(path.read_text())]))
    for i in range(12):
        (tmp_path / f"data/{i}.png").write_text("no picture")
    flags = f"{FLAGS}{data_flags} --on_bad_sample skip --max_bad_fraction 0.2 --output_dir {tmp_path / 'out'}"
    ended = run(flags, tmp_path)
    assert ended.code == 2 and "of 24 samples cannot be used, more than --max_bad_fraction 0.2" in ended.error
    assert ended.err.count("warning: left out: record same: image") >= 5, "each is named"


def test_all_samples_of_a_micro_batch_are_bad(tmp_path: Path) -> None:
    """Such a micro-batch has no image and no label; its loss is 0 and its gradient too."""
    make_data(tmp_path / "data", 2)
    for i in range(2):
        (tmp_path / f"data/{i}.png").write_text("no picture")
    dataset = open_dataset(tmp_path / "data/records.json", skips_bad=True)
    batch = TrainCollator(load_processor("data/tiny_mgm"), 2048)([dataset[0], dataset[1]])
    assert "pixel_values" not in batch and bool((batch["labels"] == -100).all())
    model = load_model("data/tiny_mgm", torch.float32, "sdpa").train()
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        ("/env/bin/python /env/bin/accelerate launch train.py", True),
        ("python -m accelerate.commands.launch --config_file accelerate_configs/ddp.yaml train.py", True),
        ("/env/bin/torchrun --nproc_per_node 2 train.py", True),
        ("-bash", False),
        ("bash start_accelerate.sh", False),
        ("python my_sweep.py --config_file accelerate_configs/zero3.yaml", False),
    ],
)
def test_whose_end_ends_a_run(command: str, is_launcher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's alone: a run that a shell has put into the background survives the logout."""
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "info")
    parent = SimpleNamespace(pid=7, cmdline=lambda: command.split())
    monkeypatch.setattr(faults.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert find_launcher() == (7 if is_launcher else None)


def test_name_some() -> None:
    """A message stays readable."""
    assert name_some(["a", "b"]) == "a, b"
    assert name_some([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
