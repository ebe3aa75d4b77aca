"""Write the tables and the picture of docs/lora_vs_full.md and its Chinese page from results/lora_vs_full/:

python -m benchmarks.lora_vs_full_report    # in seconds
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.chinese import with_chinese
from benchmarks.lora_vs_full import BASE, LABELS, METHODS, SEARCH, SEEDS, Run, choose_rates
from benchmarks.rows import ROOT
from benchmarks.tables import NoFlags, with_tables
from evaluation.comparison import NUM_RESAMPLES, compare, percent, percents
from utils import MIB, markdown_table, run_script


RESULTS = ROOT / "results/lora_vs_full"
DOCUMENTS = [ROOT / f"docs/lora_vs_full{language}.md" for language in ("", ".zh-CN")]
PICTURE = ROOT / "docs/lora_vs_full.png"
KINDS = {"n": "number", "p": "parity", "l": "largest", "s": "sum"}  # of questions, by the letter in a run's `types`
QUESTIONS = 32  # of an update
Runs = list[dict[str, Any]]  # of one way of training, a run for each seed


def read(run: Run, folder: Path) -> dict[str, Any]:
    return json.loads(run.path(folder).read_text())


def read_runs(folder: Path) -> tuple[dict[str, Any], dict[str, Runs]]:
    """The model before training; for each method the runs with the chosen learning rate, full fine-tuning first."""
    rates = choose_rates(folder)
    runs = {name: [read(Run(name, rates[name], seed), folder) for seed in SEEDS] for name in METHODS}
    return read(Run(BASE, 0.0, 0), folder), runs


def mean(runs: Runs, key: str) -> float:
    return fmean(run[key] for run in runs)


def setup_table(folder: Path = RESULTS) -> str:
    base, methods = read_runs(folder)
    run = methods["full"][0]
    cells = [run["global_step"], QUESTIONS, base["n"], len(SEEDS)]
    cells += [run["environment"][name] for name in ("python", "torch", "transformers", "peft")]
    header = ["updates", "questions an update", "held-out questions", "seeds"]
    return markdown_table([*header, "Python", "PyTorch", "transformers", "PEFT"], [cells])


def score_table(folder: Path = RESULTS) -> str:
    base, methods = read_runs(folder)
    rows = [["before training", percent(base["score"]), "-", "0", "-", "-", "-", "-"]]
    for name, runs in methods.items():
        scores, trained = [run["score"] for run in runs], mean(runs, "trainable_params")
        minutes = fmean(run["global_step"] * QUESTIONS / run["samples_per_second"] / 60 for run in runs)
        rows.append([LABELS[name], f"{fmean(scores):.1%} ± {stdev(scores):.1%}", ", ".join(map(percent, scores))])
        rows[-1] += [f"{trained:,.0f}", percent(trained / mean(runs, "total_params"))]
        rows[-1] += [f"{mean(runs, 'peak_allocated_bytes') / MIB:.1f} MiB"]
        rows[-1] += [f"{mean(runs, 'train_peak_rss_bytes') / MIB:.0f} MiB", f"{minutes:.1f} min"]
    header = ["trained", "exact answers", "each seed", "parameters", "share", "tensors' peak", "process's peak"]
    return markdown_table([*header, "time"], rows)


def kind_table(folder: Path = RESULTS) -> str:
    base, methods = read_runs(folder)
    rows = [
        [label, *(percent(fmean(run["by_type"][kind]["score"] for run in runs)) for kind in KINDS.values())]
        for label, runs in [("before training", [base]), *((LABELS[name], methods[name]) for name in methods)]
    ]
    counts = [f"`{kind}` ({base['by_type'][kind]['n']})" for kind in KINDS.values()]
    return markdown_table(["exact answers by question", *counts], rows)


def retention_table(folder: Path = RESULTS) -> str:
    rows = []
    for name, result in retentions(folder).items():
        parts = [result, *(result["by_type"][kind] for kind in KINDS.values())]
        total, *others = (f"{percent(part['retention'])} ({percents(part['interval'])})" for part in parts)
        rows.append([LABELS[name], total, percents(result["interval_with_seeds"]), *others])
    header = ["", "all questions", "interval with the seeds", *(f"`{kind}`" for kind in KINDS.values())]
    return markdown_table(header, rows)


def retentions(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """`compare` of each method with full fine-tuning by the seeds' means, and the interval with the seeds."""
    base, methods = read_runs(folder)
    kinds = [KINDS[letter] for letter in base["types"]]
    # [seeds, N], 1 where a run answered a question right
    full, *others = (np.array([list(run["exact"]) for run in runs], dtype=float) for runs in methods.values())
    return {
        name: compare(full.mean(0), lora.mean(0), kinds) | {"interval_with_seeds": interval_with_seeds(full, lora)}
        for name, lora in zip(list(methods)[1:], others, strict=True)
    }


def interval_with_seeds(full: np.ndarray, lora: np.ndarray) -> list[float]:
    """The retention's 95 % interval when seeds and questions are drawn anew, [seeds, N] each.

    Three seeds are few to draw from: the true spread may be wider.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_questions = full.shape
    questions = rng.multinomial(num_questions, [1 / num_questions] * num_questions, NUM_RESAMPLES)  # [R, N]
    full_seeds, lora_seeds = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, (2, NUM_RESAMPLES))  # [R, seeds]
    points = [
        np.einsum("rs,sn,rn->r", seeds, exact, questions, optimize=True)
        for seeds, exact in ((full_seeds, full), (lora_seeds, lora))
    ]
    return np.percentile(points[1] / points[0], (2.5, 97.5)).tolist()


def rate_table(folder: Path = RESULTS) -> str:
    chosen = choose_rates(folder)
    rows = []
    for name, rates in SEARCH.items():
        scores = (f"{rate:g}: {read(Run(name, rate, SEEDS[0]), folder)['score']:.1%}" for rate in rates)
        rows.append([LABELS[name], "; ".join(scores), f"{chosen[name]:g}"])
    return markdown_table(["", "learning rate: exact answers", "chosen"], rows)


def draw(path: Path, folder: Path = RESULTS) -> None:
    """Accuracy of every run against the step's memory and against trained parameters."""
    _, methods = read_runs(folder)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, runs in methods.items():
        y = [100 * run["score"] for run in runs]
        for axis, key, unit in zip(axes, ("peak_allocated_bytes", "trainable_params"), (MIB, 1), strict=True):
            x = [run[key] / unit for run in runs]
            colour = axis.scatter(x, y, s=18, alpha=0.6).get_facecolor()[0, :3]
            axis.scatter(fmean(x), fmean(y), s=70, color=colour, marker="D", label=LABELS[name])
    axes[0].set(xlabel="peak of the tensors in a training step (MiB)", ylabel="exact held-out answers (%)")
    axes[1].set(xlabel="trained parameters", xscale="log")
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    for axis in axes:
        axis.axhline(90 * mean(methods["full"], "score"), color="grey", linewidth=1, linestyle="--")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, title="diamond: mean of the seeds; dashed: 90 % of full", title_fontsize=8)
    figure.savefig(path, dpi=120)


TABLES = {"setup": setup_table, "scores": score_table, "kinds": kind_table}
TABLES |= {"retention": retention_table, "rates": rate_table}


def main(_: NoFlags) -> dict[str, Any]:
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(), with_chinese(TABLES)))
    draw(PICTURE)
    return {"documents": [str(document.relative_to(ROOT)) for document in DOCUMENTS]}


if __name__ == "__main__":
    run_script(main, NoFlags)
