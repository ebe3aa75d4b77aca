"""Retention, its interval and the paired tests, against values known otherwise."""

import json

import numpy as np
import pytest

from evaluation.comparison import as_table, compare, compare_files, paired_test, retention
from utils import UserError


def test_retention():
    full, lora = np.array([1, 1, 1, 1, 0]), np.array([1, 1, 1, 0, 1])
    assert retention(full, full)["retention"] == 1 and retention(full, full)["interval"] == [1, 1]
    assert retention(full, lora)["retention"] == 1
    assert retention(full, lora * 0)["retention"] == 0
    assert retention(full * 0, lora)["retention"] is None


def test_interval_covers():
    """In 95 of 100 samples the interval should hold the true ratio, 0.72 / 0.8; chance allows 88 to 100."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        full = rng.random(300) < 0.8
        lora = np.where(full, rng.random(300) < 0.85, rng.random(300) < 0.2)  # 0.8 * 0.85 + 0.2 * 0.2 = 0.72
        low, high = retention(full.astype(float), lora.astype(float))["interval"]
        covered += low <= 0.9 <= high
    assert covered >= 88


def test_pairing_narrows_the_interval():
    """Runs that err on the same questions are compared more sharply than ones that err on different ones."""
    full = np.repeat([1.0, 0.0], [80, 20])
    alike, unlike = np.repeat([1.0, 0.0], [76, 24]), np.repeat([0.0, 1.0], [24, 76])
    widths = [np.diff(retention(full, lora)["interval"])[0] for lora in (alike, unlike)]
    assert widths[0] < widths[1] / 2


def test_mcnemar():
    """8 questions right in one run alone, 2 in the other: 2 * P(at most 2 of 10 heads) = 2 * 56 / 1024."""
    full = np.array([1] * 8 + [0] * 2 + [1] * 5 + [0] * 5)
    lora = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5)
    result = paired_test(full, lora)
    assert (result["test"], result["only_full"], result["only_lora"]) == ("mcnemar", 8, 2)
    assert result["p_value"] == pytest.approx(2 * 56 / 1024)
    assert paired_test(full, full)["p_value"] == 1


def test_scores_with_degrees():
    full = np.array([1.0, 0.3, 0.6, 0.9, 0.3, 0.6])
    assert paired_test(full, full * 0.9)["test"] == "wilcoxon"
    assert paired_test(full, full)["p_value"] == 1


def write_run(path, values, types=("a", "b"), **changes) -> str:
    scores = [{"id": str(i), "type": types[i % len(types)], "value": value} for i, value in enumerate(values)]
    path.write_text(json.dumps({"task": "demo", "metric": "exact_match", "scores": scores} | changes))
    return str(path)


def test_files(tmp_path):
    full = write_run(tmp_path / "full.json", [1, 1, 1, 0])
    lora = write_run(tmp_path / "lora.json", [1, 0, 1, 0])
    result = compare_files(full, lora)
    assert result["retention"] == pytest.approx(2 / 3) and result["n"] == 4
    assert {kind: row["retention"] for kind, row in result["by_type"].items()} == {"a": 1, "b": 0}
    assert "| all | 4 | 0.750 | 0.500 | 66.7% |" in as_table(result)
    assert compare(np.ones(2), np.ones(2), ["", ""])["by_type"] == {}


def test_runs_that_do_not_belong_together(tmp_path):
    full = write_run(tmp_path / "full.json", [1, 1])
    for other, words in [
        (write_run(tmp_path / "short.json", [1]), "1 are in one alone, 1 for one"),
        (write_run(tmp_path / "task.json", [1, 1], task="mmbench"), "has task demo"),
        (write_run(tmp_path / "empty.json", [1, 1], scores=[]), "not a result"),
    ]:
        with pytest.raises(UserError, match=words):
            compare_files(full, other)
