"""The published scores beside a model's own, by a tiny model on tiny files, and the figures of docs/evaluation.md."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_tasks import mmbench_row, write_mmbench, write_textvqa

from benchmarks.published import FILES, PUBLISHED, PublishedConfig, main
from benchmarks.report_numbers import report_numbers
from benchmarks.speed_tables import PUBLISHED_RUNS
from memory.config import ProbeConfig
from memory.probe import probe
from utils import GIB, UserError


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/evaluation.md").read_text()


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    (folder / "train_images").mkdir(parents=True)
    dataset = Path(write_textvqa(folder))
    for image in folder.glob("*.jpg"):
        shutil.move(image, folder / "train_images")
    records = json.loads(dataset.read_text())["data"]
    prompts = [{"question_id": record["image_id"], "text": f"{record['question']}\nShort."} for record in records]
    (folder / FILES["textvqa"]["ocr_file"]).write_text("\n".join(map(json.dumps, prompts)))
    Path(write_mmbench(folder, [mmbench_row()])).rename(folder / FILES["mmbench"]["dataset"])
    return folder


def test_both_are_run_once(files, tmp_path, capsys):
    settings = {"model": str(ROOT / "data/tiny_mgm"), "folder": str(files), "output": str(tmp_path / "out")}
    first = main(PublishedConfig(**settings))
    assert first["results"]["textvqa"]["n"] == 2 and first["results"]["mmbench"]["n"] == 1
    config = json.loads((tmp_path / "out/mmbench.json").read_text())["config"]
    assert config["circular"] and config["batch_size"] == 8
    assert main(PublishedConfig(**settings)) == first  # of the files: no answer is made twice
    assert all(f"| {task} | {score} |" in capsys.readouterr().out for task, score in list(PUBLISHED.items())[:1])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="TextVQA_0.5.1_val.json.*docs/evaluation.md"):
        PublishedConfig(folder=str(tmp_path))


def test_figures_of_the_page():
    """The published scores, and how long opening the images takes at least."""
    assert f"TextVQA {PUBLISHED['textvqa']}" in PAGE and f"MMBench {PUBLISHED['mmbench']}" in PAGE
    assert all(name in PAGE for files in FILES.values() for name in files.values())
    runs = json.loads((ROOT / "results/gpu/loader.json").read_text())["runs"]
    rates = {run["num_workers"]: run["images_per_second"] for run in runs}
    assert PublishedConfig.dataloader_num_workers == 2 and f"prepared {rates[2]:.0f} a second" in PAGE
    assert all(f"{5000 / rates[workers]:.0f} seconds" in PAGE for workers in (2, 8))
    numbers = report_numbers()
    median, worst = (numbers[f"time-{name}"].replace("%", " %") for name in ("median", "worst"))
    assert f"were {median} off in the median and {worst} at worst" in PAGE.replace("\n", " ")
    assert PUBLISHED_RUNS == {"TextVQA": (5000, 10), "MMBench": (4 * 1164, 2)}
    assert all(words in PAGE for words in ("5,000 questions; ten tokens", "has 1,164, in up to four\nrotations"))


@pytest.mark.slow
@pytest.mark.parametrize("cells", re.findall(r"^\| (\d+) \| ([\d.]+) GiB \| ([\d.]+) GiB \|$", PAGE, flags=re.M))
def test_the_memory_is_what_the_probe_predicts(cells):
    rows, allocated, device = cells
    result = probe(ProbeConfig(mode="predict", device="cuda", max_seq_len=1024, per_device_eval_batch_size=int(rows)))
    assert f"{result['phases']['evaluate'] / GIB:.1f}" == allocated
    assert f"{result['device_bytes'] / GIB:.1f}" == device
