"""The benchmarks: what they measure is what they say, and their tables are what they found."""

import itertools
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaConfig

from benchmarks import headline, load_dataset, loader, packing, step
from benchmarks.load_dataset import LoadConfig
from benchmarks.loss import LossConfig
from benchmarks.packing import PackingConfig
from benchmarks.step import Step, StepBenchmarkConfig
from benchmarks.tables import HEADLINE, with_tables
from data.dataset import open_dataset
from utils import UserError


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_large_file_needs_little_memory(tmp_path):
    """60,000 records, 83 MB: reading peaks little above a process that finds them cached, and that one is quick."""
    result = load_dataset.main(LoadConfig(num_records=60_000, folder=str(tmp_path)))
    first, again = result["first_load"], result["restart"]
    assert result["file_bytes"] > 70e6 and result["cache_bytes"] < 1.1 * result["file_bytes"]
    assert first["usable_records"] == again["usable_records"] == 60_000
    assert first["first_id"] == again["first_id"] and len(first["first_id"]) == 12
    assert max(run[key] for run in (first, again) for key in ("peak_rss_bytes", "child_peak_rss_bytes")) < 2**30
    assert first["peak_rss_bytes"] < again["peak_rss_bytes"] + 120e6
    assert again["seconds"] < 10 and again["cpu_seconds"] < first["cpu_seconds"] / 10
    assert list(tmp_path.iterdir()) == [], "the generated file is left behind"


def test_generated_records(tmp_path):
    """They are what they are said to be: about 1.4 kB each, ids with leading zeros, images that are there."""
    load_dataset.write_dataset(tmp_path / "data.json", 500)
    assert 1300 < (tmp_path / "data.json").stat().st_size / 500 < 1500
    dataset = open_dataset(tmp_path / "data.json")
    assert dataset.records["id"][499] == "000000000499"
    assert [image.size for image in dataset[20]["images"]] == [(64, 64)]
    records = json.loads((tmp_path / "data.json").read_text())
    assert {len(record["conversations"]) for record in records} == {2, 4, 6, 8, 10}


def test_photographs():
    """1024 x 768, different from each other, of a photograph's size."""
    first, second = itertools.islice(loader.photographs_as_jpeg(2), 2)
    assert Image.open(loader.io.BytesIO(first)).size == (1024, 768)
    assert first != second and 100_000 < len(first) < 600_000


@pytest.mark.slow
@pytest.mark.parametrize("source", ["json", "parquet"])
def test_the_loader_is_measured(source: str):
    """Both kinds of source, without a worker and with one: rates and memory of each, at MGM-2B's sizes."""
    flags = f"--seconds 1 --num_workers 1 --batch_size 2 --num_images 4 --source {source}".split()
    command = [sys.executable, "-m", "benchmarks.loader", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert [run["num_workers"] for run in result["runs"]] == [1, 0]
    for run in result["runs"]:
        assert 0 < run["images_per_second_per_worker"] < 500 and 0.001 < run["cpu_seconds_per_image"] < 2
        assert [len(mark["workers_rss_bytes"]) for mark in run["memory"]] == [run["num_workers"]] * 3
        assert run["memory"][-1]["seconds"] >= 1
    processor = loader.mgm_2b_processor()
    assert processor.num_image_tokens == 576
    views = processor.image_views(Image.new("RGB", (1024, 768)))
    assert [tuple(view.shape) for view in views] == [(3, 336, 336), (3, 768, 768)]


@pytest.mark.parametrize("name", ["data_scale", "loader"])
def test_committed_results(name: str):
    """The result files hold what the benchmarks report today, with the machine and the versions."""
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert {"benchmark", "machine", "versions"} <= result.keys()


@pytest.fixture
def tiny_step(monkeypatch: pytest.MonkeyPatch) -> StepBenchmarkConfig:
    """The step benchmark with a small language model."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    monkeypatch.setitem(step.SIZES, "small", lambda: GemmaConfig(**sizes, **heads))
    return StepBenchmarkConfig(device="cpu", num_tokens=64)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_our_step_is_the_trainers(tiny_step, gradient_checkpointing):
    """Loss and gradient norm of three updates in two calls, train.py's step against transformers' Trainer."""
    found, expected = (
        variant.run(1) + variant.run(2)
        for variant in (step.KINDS[kind](tiny_step, gradient_checkpointing) for kind in list(step.KINDS)[:2])
    )
    assert len(found) == len(expected) == 3
    assert found[0].loss - found[2].loss > 1e-3, "nothing is learned"
    for a, b in zip(found, expected, strict=True):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)
        assert 0 < a.seconds and 0 < b.seconds


@pytest.mark.slow
def test_zero3_takes_the_same_steps():
    """Loss and gradient norm of two updates, under real DeepSpeed and without."""
    config = StepBenchmarkConfig(device="cpu", num_tokens=32)
    steps = []
    for kind in ("train.py", step.ZERO3):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            steps.append(pool.submit(step.build, config, kind, True).result()[0])
    for a, b in zip(*steps, strict=True):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("config_class", [StepBenchmarkConfig, LossConfig])
def test_a_gpu_that_is_not_there(config_class):
    with pytest.raises(UserError, match="--device cuda: this machine has no GPU, choose cpu"):
        config_class(device="cuda")


def test_variants_that_disagree_are_refused():
    """One step of one variant with another gradient norm."""
    steps = {variant: [Step(1.0, 2.0, 0.5), Step(1.0, 1.9, 0.4)] for variant in step.VARIANTS}
    step.check_agreement(steps)
    steps[step.VARIANTS[3]] = [Step(1.0, 2.0, 0.5), Step(1.0, 1.9, 0.41)]
    with pytest.raises(ValueError, match="grad_norm of .* is 0.41"):
        step.check_agreement(steps)


def test_step_flops(tiny_step):
    """The formula against a count of the products that run. The counter leaves CPU attention out, the formula LoRA's
    matrices; and no gradient goes on from the first layer's q, k and v to the frozen embedding."""
    variant = step.Ours(tiny_step, gradient_checkpointing=False)
    with FlopCounterMode(display=False) as counter:
        variant.run(1)
    attention = 2 * 3 * 2 * 64**2 * 128
    lora = 2 * 3 * 2 * 64 * 16 * (3 * 128 + 128 + 32 + 128)  # widths in and out of q, v and o
    first_layer = 2 * 64 * 128 * (128 + 32 + 32) + 2 * 2 * 64 * 16 * 128
    assert counter.get_total_flops() == step.step_flops(tiny_step) - attention + lora - first_layer


def test_ratios_are_against_the_better_baseline():
    """By hand: ours 100 tokens/s at 6 bytes, rivals 40 and 50 with checkpointing, 80 and 60 without."""
    names = ("kind", "gradient_checkpointing", "tokens_per_second", "peak_bytes")
    values = [("train.py", True, 100, 6), ("a", True, 40, 10), ("b", True, 50, 12), ("a", False, 80, 20)]
    rows = [dict(zip(names, row, strict=True)) for row in [*values, ("b", False, 60, 30)]]
    (ratio,) = step.ratios(rows)
    assert (ratio["speed_against_with_checkpointing"], ratio["speed_against_without_checkpointing"]) == (2, 1.25)
    assert ratio["peak_against_lowest"] == 0.6
    assert ratio["peak_against_without_checkpointing"] == 0.3


@pytest.mark.slow
def test_packing_is_measured(tmp_path):
    """All variants have every sample, within the budget; without padding rows would be full."""
    config = PackingConfig(num_samples=48, rounds=1, output=str(tmp_path / "packing.json"))
    result = packing.main(config)
    assert json.loads((tmp_path / "packing.json").read_text()) == result
    assert result["cases"]["demo"]["lengths"]["longest"] < 45
    lengths = result["cases"]["conversations"]["lengths"]
    assert lengths["longest"] <= 256 and lengths["mean"] > 2 * lengths["shortest"]
    for case in result["cases"].values():
        assert case["padded_batch_size"] * case["lengths"]["longest"] <= 4 * 256
        for name, variant in case["variants"].items():
            assert 0 <= variant["padding_share"] < 1 and variant["samples_per_second"] > 0
            assert case["losses"][name] == pytest.approx(case["losses"]["packed"], rel=1e-4)
    shares = {name: row["padding_share"] for name, row in result["cases"]["conversations"]["variants"].items()}
    assert shares["shuffled"] > shares["sorted"] > shares["packed"]


@pytest.mark.slow
def test_a_row_of_the_headline_is_predicted_again():
    """The committed prediction of MGM-2B is the code's, to the byte."""
    result = json.loads(HEADLINE.read_text())
    row = result["rows"][0]
    assert {"flags": row["flags"]} | headline.predict_row(result["model"], row["flags"]) == row


@pytest.mark.slow
def test_waiting_is_measured(tmp_path):
    """Without a worker the steps wait for every batch; one is told from the other."""
    flags = f"--num_workers 0 --max_steps 4 --output {tmp_path / 'waiting.json'}".split()
    command = [sys.executable, "-m", "benchmarks.waiting", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (run,) = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert run["num_workers"] == 0
    assert 0.001 < run["median_wait_seconds"] <= run["longest_wait_seconds"] < 60
    assert 0 < run["waiting_share"] < 1


def test_tables_of_speed_are_generated():
    """docs/speed.md as `python -m benchmarks.tables` would write it now."""
    text = (ROOT / "docs/speed.md").read_text()
    assert with_tables(text) == text
    assert all(f"<!-- {name} -->" in text for name in ("step", "packing", "loader"))
