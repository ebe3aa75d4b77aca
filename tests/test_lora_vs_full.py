"""The LoRA experiment: which runs it makes, what a run reports, and what its document says."""

import json
import re
import subprocess
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from benchmarks import lora_vs_full, lora_vs_full_report
from benchmarks.chinese import in_chinese, with_chinese
from benchmarks.lora_vs_full import BASE, METHODS, SEARCH, SEEDS, ExperimentConfig, Run, choose_rates, main
from benchmarks.lora_vs_full_report import DOCUMENTS, PICTURE, TABLES, mean
from benchmarks.tables import with_tables
from utils import write_json


KINDS = {"n": ("number", 200), "p": ("parity", 200), "l": ("largest", 50), "s": ("sum", 25)}
BEST = {"full": 2e-3, "lora-r16": 4e-3, "all-linear-r16": 2e-3, "projector": 8e-3}


def fake_result(run: Run, num_right: int) -> dict:
    """A run that answers the first `num_right` of every 100 questions."""
    types = "".join(letter * count for letter, (_, count) in KINDS.items())
    exact = "".join("1" if i % 100 < num_right else "0" for i in range(len(types)))
    by_type = {}
    for letter, (kind, count) in KINDS.items():
        right = [int(digit) for digit, other in zip(exact, types, strict=True) if other == letter]
        by_type[kind] = {"score": sum(right) / count, "n": count}
    result = {"method": run.method, "learning_rate": run.learning_rate, "seed": run.seed, "global_step": 594}
    result |= {"trainable_params": 90_000, "total_params": 1_000_000, "samples_per_second": 100.0, "n": len(types)}
    result |= {"train_peak_rss_bytes": 6e8, "peak_allocated_bytes": 5e7, "exact": exact, "types": types}
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    return result | {
        "score": exact.count("1") / len(exact),
        "by_type": by_type,
        "seconds": 1.0,
        "environment": versions,
    }


def pretend(monkeypatch, num_right=lambda run: 80) -> list[Run]:
    """Instead of training, note which runs are asked for."""
    asked = []

    def execute(run, config, longest):
        asked.append(run)
        is_best = run.method in (BASE, *lora_vs_full.SEARCHED_BY) or run.learning_rate == BEST[run.method]
        return fake_result(run, num_right(run) if is_best else 10)

    monkeypatch.setattr(lora_vs_full, "execute", execute)
    monkeypatch.setattr(lora_vs_full, "prepare_demo", lambda: 39)
    return asked


def test_runs(monkeypatch, tmp_path):
    """A search with one seed, then the chosen rates with all; r=8 and r=32 take r=16's; nothing is run twice."""
    asked = pretend(monkeypatch)
    result = main(ExperimentConfig(output=str(tmp_path), jobs=3))
    assert len(asked) == len(set(asked)) == result["runs"] == 1 + 16 + 14
    assert result["learning_rates"] == BEST | {"lora-r8": 4e-3, "lora-r32": 4e-3}
    for method in METHODS:
        rate = result["learning_rates"][method]
        assert all(Run(method, rate, seed).path(tmp_path).exists() for seed in SEEDS)
    asked.clear()
    Run("full", 2e-3, 2).path(tmp_path).unlink()
    main(ExperimentConfig(output=str(tmp_path)))
    assert asked == [Run("full", 2e-3, 2)]


def test_a_failed_run_is_told_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    asked = pretend(monkeypatch)
    execute = lora_vs_full.execute

    def breaks(run, config, longest):
        if run == Run("full", 1e-3, 1):
            raise subprocess.CalledProcessError(1, ["train.py"], stderr="out of something")
        return execute(run, config, longest)

    monkeypatch.setattr(lora_vs_full, "execute", breaks)
    with pytest.raises(RuntimeError, match="1 runs failed: full-lr0.001-seed1"):
        main(ExperimentConfig(output=str(tmp_path), methods=["full"]))
    assert "out of something" in capsys.readouterr().out
    assert len(asked) == len(list(tmp_path.glob("*.json"))) == 5


def test_only_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--peaks: of each run that is there the memory is new and the rest stays; nothing is trained."""
    runs = [Run("full", 1e-3, 1), Run("full", 1e-3, 2), Run("lora-r8", 2e-3, 1)]
    for run in runs:
        write_json(run.path(tmp_path), fake_result(run, 50))
    write_json(tmp_path / "base.json", {"score": 0.1})
    monkeypatch.setattr(lora_vs_full, "prepare_demo", lambda: 39)
    monkeypatch.setattr(
        lora_vs_full, "measure_peak", lambda method, longest: {"peak_allocated_bytes": longest * len(method)}
    )
    assert main(ExperimentConfig(output=str(tmp_path), peaks=True))["runs"] == 3
    for run in runs:
        expected = fake_result(run, 50) | {"peak_allocated_bytes": 39 * len(run.method)}
        assert json.loads(run.path(tmp_path).read_text()) == expected
    assert json.loads((tmp_path / "base.json").read_text()) == {"score": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora-r8", "projector"])
def test_a_real_run(method, tmp_path):
    """Two updates: what the scripts report of an adapter and of a model arrives in the result, in under 4 kB."""
    config = ExperimentConfig(output=str(tmp_path), max_steps=2)
    result = lora_vs_full.execute(Run(method, 1e-3, 1), config, lora_vs_full.prepare_demo())
    assert fake_result(Run(method, 1e-3, 1), 5).keys() <= result.keys()
    assert result["global_step"] == 2 and len(result["exact"]) == len(result["types"]) == 475
    assert result["score"] == result["exact"].count("1") / 475
    assert 2**20 < result["peak_allocated_bytes"] < result["train_peak_rss_bytes"]
    assert len(json.dumps(result)) < 4000


def test_the_tables_say_what_the_data_says(monkeypatch, tmp_path):
    """Full fine-tuning answers the first 80 of every 100 questions right, the others the first 40."""
    pretend(monkeypatch, lambda run: 80 if run.method == "full" else 40)
    main(ExperimentConfig(output=str(tmp_path)))
    tables = {name: table(tmp_path) for name, table in TABLES.items()}
    assert "| 594 | 32 | 475 | 3 | 3.11.7 |" in tables["setup"]
    assert [name for name, text in tables.items() if "| LoRA r=16, q v o |" in text] == list(tables)[1:]
    assert "| LoRA r=16, q v o | 42.1% ± 0.0% | 42.1%, 42.1%, 42.1% | 90,000 | 9.0% | 47.7 MiB |" in tables["scores"]
    assert "| LoRA r=16, q v o | 40.0% | 40.0% | 80.0% | 0.0% |" in tables["kinds"]
    assert "| LoRA r=16, q v o | 50.6% (" in tables["retention"]
    assert "0.004: 42.1%; 0.008: 10.5% | 0.004 |" in tables["rates"]
    lora_vs_full_report.draw(tmp_path / "plot.png", tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_interval_with_seeds_is_wider():
    """One seed of three that fails widens the interval far beyond what the questions alone leave open."""
    full, steady = np.ones((3, 100)), np.ones((3, 100))
    steady[:, :10] = 0
    uneven = np.ones((3, 100))
    uneven[0, :30] = 0
    assert lora_vs_full_report.interval_with_seeds(full, full) == [1, 1]
    low, high = lora_vs_full_report.interval_with_seeds(full, steady)
    assert 0.83 < low < 0.87 and 0.93 < high < 0.97
    low, high = lora_vs_full_report.interval_with_seeds(full, uneven)
    assert low < 0.8 and high == 1


def test_the_best_rate_is_chosen(tmp_path):
    for rate, right in zip(SEARCH["full"], (10, 30, 20, 5, 1), strict=True):
        run = Run("full", rate, SEEDS[0])
        run.path(tmp_path).write_text(json.dumps(fake_result(run, right)))
    assert choose_rates(tmp_path) == {"full": SEARCH["full"][1]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_generated(document):
    """The document as `python -m benchmarks.lora_vs_full_report` would write it now."""
    text, language = document.read_text(), " zh" if ".zh-CN" in document.name else ""
    assert all(f"<!-- {name}{language} -->" in text for name in TABLES)
    assert with_tables(text, with_chinese(TABLES)) == text
    assert f"]({PICTURE.name})" in text and PICTURE.exists()


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_nothing_of_a_chinese_table_is_english(table):
    names = r"`\w+`|q、v、o|\b(LoRA r|projector|Python|PyTorch|transformers|PEFT|MiB|min)\b"
    assert not re.findall(r"[A-Za-z]+", re.sub(names, "", in_chinese(table())))


def test_the_prose_agrees_with_the_results():
    """Each finding of the document, in its order, from the committed runs."""
    base, runs = lora_vs_full_report.read_runs(lora_vs_full_report.RESULTS)
    kept = lora_vs_full_report.retentions()
    assert kept["lora-r16"]["interval_with_seeds"][0] > 0.9 and base["score"] < 0.1
    assert 0.09 < mean(runs["lora-r16"], "trainable_params") / mean(runs["lora-r16"], "total_params") < 0.11
    ranks = [[run["score"] for run in runs[f"lora-r{rank}"]] for rank in (8, 16, 32)]
    assert sorted(ranks, key=fmean) == ranks == sorted(ranks, key=stdev, reverse=True)
    assert kept["all-linear-r16"]["retention"] > kept["lora-r16"]["retention"]
    assert stdev(run["score"] for run in runs["all-linear-r16"]) < stdev(ranks[1])
    assert 0.22 < kept["projector"]["retention"] < 0.28
    memory, speed = (
        {name: mean(runs[name], key) / mean(runs["full"], key) for name in runs}
        for key in ("peak_allocated_bytes", "samples_per_second")
    )
    text = " ".join(lora_vs_full_report.DOCUMENTS[0].read_text().split())
    less = [f"{1 - memory[name]:.0%}".replace("%", " %") for name in ("lora-r16", "all-linear-r16")]
    assert "needs {} less memory than a step of full fine-tuning, on all linear layers {} less".format(*less) in text
    assert speed["lora-r16"] == pytest.approx(1 - 1 / 5, abs=0.02)
    kinds = kept["lora-r16"]["by_type"]
    assert kinds.pop("sum")["full_score"] < 0.2 and all(kind["retention"] > 0.9 for kind in kinds.values())
    chosen = choose_rates(lora_vs_full_report.RESULTS)
    assert [name for name, rates in SEARCH.items() if chosen[name] in (rates[0], rates[-1])] == ["projector"]
    assert max(SEARCH, key=lambda name: len(SEARCH[name])) == "full"
