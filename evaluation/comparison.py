"""How much of one run's score another keeps, question by question, and how sure that is."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, wilcoxon

from utils import UserError, markdown_table


CONFIDENCE = 0.95
NUM_RESAMPLES = 9999


def compare_files(full_path: str, lora_path: str) -> dict[str, Any]:
    """Retention of the second run relative to the first, by question type too.

    Raises:
        UserError: a file is not eval.py's, or the two have not answered the same questions.
    """
    full, lora = read_run(full_path), read_run(lora_path)
    for name in ("task", "metric"):
        if full[name] != lora[name]:
            raise UserError(f"--compare: {full_path} has {name} {full[name]}, {lora_path} {lora[name]}")
    ids = [[item["id"] for item in run["scores"]] for run in (full, lora)]
    if ids[0] != ids[1]:
        only = sorted(set(ids[0]) ^ set(ids[1]))
        what = f"{len(only)} are in one alone, {only[0]} for one" if only else "their order differs"
        raise UserError(f"--compare: {full_path} and {lora_path} have not answered the same questions ({what})")
    types = [item["type"] for item in full["scores"]]
    values = [np.array([item["value"] for item in run["scores"]]) for run in (full, lora)]
    result = {"task": full["task"], "metric": full["metric"], "full": full_path, "lora": lora_path}
    return result | compare(*values, types)


def read_run(path: str) -> dict[str, Any]:
    try:
        run = json.loads(Path(path).read_text())
        if not run["scores"] or not all({"id", "type", "value"} <= item.keys() for item in run["scores"]):
            raise ValueError("no scores")
        return run | {"task": run["task"], "metric": run["metric"]}
    except OSError:
        raise UserError(f"--compare {path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--compare {path}: it is not a result of eval.py --output") from None


def compare(full: np.ndarray, lora: np.ndarray, types: list[str]) -> dict[str, Any]:
    """Scores [N] of the same questions in two runs to retention, its interval, the test and the same by type."""
    kinds = [kind for kind in dict.fromkeys(types) if kind]
    masks = {kind: np.array(types) == kind for kind in kinds}
    return {
        **retention(full, lora),
        **paired_test(full, lora),
        "by_type": {kind: retention(full[mask], lora[mask]) for kind, mask in masks.items()},
    }


def retention(full: np.ndarray, lora: np.ndarray) -> dict[str, Any]:
    """Mean of `lora` / mean of `full`, with a percentile bootstrap over the questions, which stay paired.

    None where `full` scores 0. The interval says what other questions might have shown, not other seeds.
    """
    result = {"n": len(full), "full_score": float(full.mean()), "lora_score": float(lora.mean())}
    if not full.any():
        return result | {"retention": None, "interval": None}
    result["retention"] = result["lora_score"] / result["full_score"]
    if len(full) < 2:
        return result | {"interval": None}
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings(action="ignore"):
        ratios = bootstrap(
            (full, lora),
            lambda full, lora, axis: lora.mean(axis) / full.mean(axis),
            n_resamples=NUM_RESAMPLES,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    # In a sample of few questions `full` may score 0: it has no ratio.
    tails = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    return result | {"interval": np.percentile(ratios[np.isfinite(ratios)], tails).tolist()}


def paired_test(full: np.ndarray, lora: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test where an answer is right or wrong; Wilcoxon's signed ranks where scores have degrees."""
    if np.isin([full, lora], (0, 1)).all():
        only_full, only_lora = int((full > lora).sum()), int((lora > full).sum())
        differing = only_full + only_lora
        p_value = binomtest(only_full, differing).pvalue if differing else 1.0
        return {"test": "mcnemar", "only_full": only_full, "only_lora": only_lora, "p_value": float(p_value)}
    p_value = wilcoxon(full, lora).pvalue if (full != lora).any() else 1.0
    return {"test": "wilcoxon", "p_value": float(p_value)}


def as_table(result: dict[str, Any]) -> str:
    """The result of `compare` as a Markdown table."""
    rows = [("all", result), *result["by_type"].items()]
    cells = [
        [name, row["n"], f"{row['full_score']:.3f}", f"{row['lora_score']:.3f}"]
        + [percent(row["retention"]), percents(row["interval"])]
        for name, row in rows
    ]
    return markdown_table(["questions", "n", "full", "LoRA", "retention", "95 % interval"], cells)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def percents(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
