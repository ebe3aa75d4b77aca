"""The benchmarks: what they measure is what they say, and their tables are what they found."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import headline, load_dataset, loader, packing
from benchmarks.load_dataset import LoadConfig
from benchmarks.loss import LossConfig
from benchmarks.packing import PackingConfig
from benchmarks.step import StepBenchmarkConfig
from benchmarks.tables import HEADLINE, trained_families_table, with_tables
from data.dataset import open_dataset
from memory.launch import in_fresh_process
from tests.tiny_families import TRAINED
from utils import UserError


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_large_file_needs_little_memory(tmp_path):
    """60,000 records, 83 MB: reading peaks little above a process that finds them cached, and that one is quick."""
    # Linux counts the peak of the process that starts another one as the other's: pytest's must not be among them.
    result = in_fresh_process(load_dataset.main, LoadConfig(num_records=60_000, folder=str(tmp_path)))
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("config_class", [StepBenchmarkConfig, LossConfig])
def test_a_gpu_that_is_not_there(config_class):
    with pytest.raises(UserError, match="--device cuda: this machine has no GPU, choose cpu"):
        config_class(device="cuda")


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


def test_a_family_that_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's table needs its predictions first."""
    monkeypatch.setitem(TRAINED, "new", "New")
    with pytest.raises(UserError, match="has no row of new: python -m benchmarks.families measures it"):
        trained_families_table()


def test_tables_of_speed_are_generated():
    """docs/speed.md as `python -m benchmarks.tables` would write it now."""
    text = (ROOT / "docs/speed.md").read_text()
    assert with_tables(text) == text
    assert all(f"<!-- {name} -->" in text for name in ("step", "packing", "loader"))
