"""Write docs/lora_vs_full.md and its pictures from results/lora_vs_full/: `python -m benchmarks.lora_vs_full_report`.

Every sentence with a figure is made from the results, so that it cannot outlive them. A test compares the file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.lora_vs_full import BASE, METHODS, SEARCH, SEARCHED_BY, SEEDS, Run, choose_rates
from evaluation.comparison import compare, percent, percents


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results/lora_vs_full"
DOCUMENT = ROOT / "docs/lora_vs_full.md"
KINDS = {"n": "number", "p": "parity", "l": "largest", "s": "sum"}
LABELS = {
    "full": "full fine-tuning",
    "lora-r8": "LoRA r=8, q v o",
    "lora-r16": "LoRA r=16, q v o",
    "lora-r32": "LoRA r=32, q v o",
    "all-linear-r16": "LoRA r=16, all linear",
    "projector": "projector alone",
}
PROMISE = 0.9  # of the full model's quality, the plan's words
MIB = 2**20


@dataclass(frozen=True)
class Method:
    """One way of training with its seeds' runs."""

    name: str
    runs: list[dict[str, Any]]

    @property
    def scores(self) -> list[float]:
        return [run["score"] for run in self.runs]

    def mean(self, key: str) -> float:
        return fmean(run[key] for run in self.runs)

    @property
    def exact(self) -> np.ndarray:
        """1 where a seed's run answered a question right, [seeds, N]."""
        return np.array([[float(digit) for digit in run["exact"]] for run in self.runs])


def read_results(folder: Path = RESULTS) -> tuple[dict[str, Method], dict[str, Any], dict[str, float]]:
    """The ways of training, the model as it was before, and the learning rates that the search chose."""
    chosen = choose_rates(folder)
    methods = {}
    for name in METHODS:
        paths = [Run(name, chosen[name], seed).path(folder) for seed in SEEDS]
        methods[name] = Method(name, [json.loads(path.read_text()) for path in paths])
    return methods, json.loads(Run(BASE, 0.0, 0).path(folder).read_text()), chosen


def document(folder: Path = RESULTS) -> str:
    methods, base, chosen = read_results(folder)
    kinds = [KINDS[letter] for letter in base["types"]]
    comparisons = {
        name: compare_with_full(methods["full"].exact, method.exact, kinds)
        for name, method in methods.items()
        if name != "full"
    }
    first = methods["full"].runs[0]
    environment = first["environment"]
    return f"""\
# How much of full fine-tuning does LoRA keep?

Measured on the demo: the tiny MGM of this repository, one epoch of {first["global_step"]} updates of 32 questions
about handwritten numbers, {len(SEEDS)} seeds each, {first["n"]} held-out questions about scans that no training image
shows. fp32 on a CPU, one thread a run; Python {environment["python"]}, PyTorch {environment["torch"]}, transformers
{environment["transformers"]}, PEFT {environment["peft"]}. The tiny model is no MGM-2B: what holds here is a reason to
expect it there, not a proof.

    python -m benchmarks.lora_vs_full --jobs 16     # the runs
    python -m benchmarks.lora_vs_full_report        # this document

## What the data says

{findings(methods, comparisons, base)}

## Scores

{score_table(methods, base)}

The mean of the seeds, with the standard deviation between them. Trained: LoRA's factors, and projector and patch info
mining in full; full fine-tuning trains the language model as well, the towers stay frozen everywhere.

{type_table(methods, base)}

![Accuracy against the step's memory and against trained parameters](lora_vs_full.png)

## Retention

{retention_table(comparisons)}

Retention is a way's score over that of full fine-tuning. In brackets a bootstrap over the held-out questions, paired,
each question's score being the mean of its {len(SEEDS)} seeds: what other questions might have shown. For the interval
with the seeds these are drawn anew as well, {len(SEEDS)} of {len(SEEDS)} on either side: few to draw from.

## The learning rates

Each way was given its own, by one run with seed {SEEDS[0]} for each candidate, the best held-out score winning:

{search_table(folder, chosen)}

{search_notes(folder, chosen)}
The same held-out questions choose the rate and give the score, for every way alike. Full fine-tuning had the most
candidates, which favours it, and so speaks against LoRA rather than for it.
"""


def compare_with_full(full: np.ndarray, lora: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    """[seeds, N] each: `compare` of the seeds' means, and the interval in which the seeds are drawn too."""
    return compare(full.mean(0), lora.mean(0), kinds) | {"interval_with_seeds": interval_with_seeds(full, lora)}


def interval_with_seeds(full: np.ndarray, lora: np.ndarray, num_resamples: int = 9999) -> list[float]:
    """95 % of the retention when both the seeds of each side and the questions are drawn anew, [seeds, N] each.

    Three seeds are few to draw from: the true spread may be wider still.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_questions = full.shape
    questions = rng.multinomial(num_questions, [1 / num_questions] * num_questions, num_resamples)  # [R, N]
    full_seeds, lora_seeds = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, (2, num_resamples))  # [R, seeds]
    points = [
        np.einsum("rs,sn,rn->r", seeds, exact, questions, optimize=True)
        for seeds, exact in ((full_seeds, full), (lora_seeds, lora))
    ]
    return np.percentile(points[1] / points[0], (2.5, 97.5)).tolist()


def findings(methods: dict[str, Method], comparisons: dict[str, dict[str, Any]], base: dict[str, Any]) -> str:
    """The sentences that the plan's promises call for, each from the figures."""
    lines = [promise(methods, comparisons["lora-r16"], base), share(methods), ranks(methods, comparisons)]
    lines += [all_linear(methods, comparisons), projector(comparisons["projector"]), memory(methods), speed(methods)]
    return "\n".join(f"- {line}" for line in lines + weak_types(comparisons["lora-r16"]))


def promise(methods: dict[str, Method], kept: dict[str, Any], base: dict[str, Any]) -> str:
    if kept["interval_with_seeds"][0] >= PROMISE:
        verdict = "holds"
    else:
        verdict = "is kept on average, not for certain" if kept["retention"] >= PROMISE else "fails"
    return (
        f"The promise of {PROMISE:.0%} **{verdict}** on the demo: LoRA r=16 on q, v and o keeps "
        f"{percent(kept['retention'])} of full fine-tuning's accuracy (95 % interval over questions and seeds "
        f"{percents(kept['interval_with_seeds'])}); {methods['lora-r16'].mean('score'):.1%} against "
        f"{methods['full'].mean('score'):.1%} of the answers are exact. The model as it was answers "
        f"{base['score']:.1%}."
    )


def share(methods: dict[str, Method]) -> str:
    lora, full = (
        methods[name].mean("trainable_params") / methods[name].mean("total_params") for name in ("lora-r16", "full")
    )
    words = "holds" if lora < 0.01 else "does not hold"
    return (
        f'"Less than 1 % of the parameters" {words} here: LoRA r=16 trains {lora:.1%} of the tiny model (full '
        f"fine-tuning {full:.1%}). Its matrices are small, and projector and mining are trained beside it. For MGM-2B "
        "it is 0.5 %."
    )


def ranks(methods: dict[str, Method], comparisons: dict[str, dict[str, Any]]) -> str:
    names = [f"lora-r{rank}" for rank in (8, 16, 32)]
    kept = [comparisons[name]["retention"] for name in names]
    spreads = [stdev(methods[name].scores) for name in names]
    words = "the mean rises with the rank" if kept == sorted(kept) else "the mean does not rise with the rank"
    if spreads == sorted(spreads, reverse=True) and spreads[0] > 0.02:
        words += ", and what rises more is reliability: a low rank is luckier with some seeds than with others"
    return (
        f"Ranks 8, 16 and 32 keep {', '.join(map(percent, kept))}, with {', '.join(map(percent, spreads))} between "
        f"the seeds: {words}."
    )


def all_linear(methods: dict[str, Method], comparisons: dict[str, dict[str, Any]]) -> str:
    kept = comparisons["all-linear-r16"]["retention"]
    gain = kept - comparisons["lora-r16"]["retention"]
    spreads = [stdev(methods[name].scores) for name in ("all-linear-r16", "lora-r16")]
    words = "The plan's q, v and o are not the best choice here" if gain > 0 else "They are not worth it here"
    return (
        f"All linear layers instead of q, v and o keep {percent(kept)}, {abs(gain):.1%} "
        f"{'more' if gain > 0 else 'less'}, with {spreads[0]:.1%} between the seeds instead of {spreads[1]:.1%}. "
        f"{words}; three seeds are few to say so."
    )


def projector(result: dict[str, Any]) -> str:
    needed = result["retention"] < PROMISE
    words = "the language model has to learn too" if needed else "the demo asks little of the language model"
    return f"The projector alone keeps {percent(result['retention'])}: {words}."


def more_or_less(value: float, other: float) -> str:
    return f"{abs(value / other - 1):.1%} {'more' if value > other else 'less'}"


def memory(methods: dict[str, Method]) -> str:
    full, lora, linear = (
        methods[name].mean("peak_allocated_bytes") for name in ("full", "lora-r16", "all-linear-r16")
    )
    return (
        f"A step with LoRA r=16 takes {more_or_less(lora, full)} memory than one of full fine-tuning, with all linear "
        f"layers {more_or_less(linear, full)}: in a model this small activations weigh most, and LoRA adds some. At "
        "MGM-2B's size the gradients and AdamW's states weigh most (lora.md, README)."
    )


def speed(methods: dict[str, Method]) -> str:
    full, lora = (methods[name].mean("samples_per_second") for name in ("full", "lora-r16"))
    return (
        f"Training with LoRA r=16 is {abs(lora / full - 1):.1%} {'faster' if lora > full else 'slower'} than full "
        "fine-tuning on this CPU: it saves the weights' gradients, and adds two small multiplications and a dropout "
        "to each of its layers."
    )


def weak_types(kept: dict[str, Any]) -> list[str]:
    """Question types on which LoRA keeps less than promised, or on which full fine-tuning does not learn either."""
    lines = []
    for kind, row in kept["by_type"].items():
        if row["full_score"] < 0.2:
            lines.append(
                f"`{kind}` says nothing about LoRA: full fine-tuning answers {row['full_score']:.1%} of {row['n']}."
            )
        elif row["retention"] < PROMISE:
            lines.append(
                f"On `{kind}` LoRA r=16 keeps {percent(row['retention'])} ({percents(row['interval'])}), less than "
                f"promised: {row['lora_score']:.1%} against {row['full_score']:.1%} of {row['n']}."
            )
    return lines


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]])


def score_table(methods: dict[str, Method], base: dict[str, Any]) -> str:
    rows = [["before training", f"{base['score']:.1%}", "-", "0", "-", "-", "-", "-"]]
    for method in methods.values():
        trained, total = method.mean("trainable_params"), method.mean("total_params")
        minutes = fmean(run["global_step"] * 32 / run["samples_per_second"] / 60 for run in method.runs)
        rows.append(
            [
                LABELS[method.name],
                f"{method.mean('score'):.1%} ± {stdev(method.scores):.1%}",
                ", ".join(f"{score:.1%}" for score in method.scores),
                f"{trained:,.0f}",
                f"{trained / total:.1%}",
                f"{method.mean('peak_allocated_bytes') / MIB:.1f} MiB",
                f"{method.mean('train_peak_rss_bytes') / MIB:.0f} MiB",
                f"{minutes:.1f} min",
            ]
        )
    header = [
        "trained",
        "exact answers",
        "each seed",
        "parameters",
        "share",
        "tensors' peak",
        "process's peak",
        "time",
    ]
    return table(header, rows)


def type_table(methods: dict[str, Method], base: dict[str, Any]) -> str:
    rows = [["before training", *(f"{base['by_type'][kind]['score']:.1%}" for kind in KINDS.values())]]
    for method in methods.values():
        means = [fmean(run["by_type"][kind]["score"] for run in method.runs) for kind in KINDS.values()]
        rows.append([LABELS[method.name], *(f"{mean:.1%}" for mean in means)])
    header = [f"{kind} ({base['by_type'][kind]['n']})" for kind in KINDS.values()]
    return table(["exact answers by question", *header], rows)


def retention_table(comparisons: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, result in comparisons.items():
        kinds = [result["by_type"][kind] for kind in KINDS.values()]
        rows.append([LABELS[name], f"{percent(result['retention'])} ({percents(result['interval'])})"])
        rows[-1].append(percents(result["interval_with_seeds"]))
        rows[-1] += [f"{percent(row['retention'])} ({percents(row['interval'])})" for row in kinds]
    return table(["", "all", "interval with the seeds", *KINDS.values()], rows)


def search_table(folder: Path, chosen: dict[str, float]) -> str:
    rows = []
    for method, rates in SEARCH.items():
        scores = [searched(method, rate, folder) for rate in rates]
        cells = [f"{rate:g}: {score:.1%}" for rate, score in zip(rates, scores, strict=True)]
        rows.append([LABELS[method], "; ".join(cells), f"{chosen[method]:g}"])
    return table(["", "learning rate: exact answers", "chosen"], rows)


def searched(method: str, rate: float, folder: Path) -> float:
    return json.loads(Run(method, rate, SEEDS[0]).path(folder).read_text())["score"]


def search_notes(folder: Path, chosen: dict[str, float]) -> str:
    others = " and ".join(LABELS[name] for name in SEARCHED_BY)
    notes = [f"{others} take the rate of {LABELS['lora-r16']}; alpha / r is 2 throughout."]
    for method, rates in SEARCH.items():
        if chosen[method] in (rates[0], rates[-1]):
            notes.append(
                f"The best rate of {LABELS[method]} lies at the edge of its candidates: a better one may lie beyond."
            )
    return "\n".join(notes)


def draw(path: Path, folder: Path = RESULTS) -> None:
    """Accuracy of every run against the step's memory and against trained parameters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    methods, base, _ = read_results(folder)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for method in methods.values():
        label = LABELS[method.name]
        memory = [run["peak_allocated_bytes"] / MIB for run in method.runs]
        trained = [run["trainable_params"] for run in method.runs]
        for axis, x in zip(axes, (memory, trained), strict=True):
            points = axis.scatter(x, [100 * score for score in method.scores], s=18, alpha=0.6)
            colour = points.get_facecolor()[0, :3]
            axis.scatter(fmean(x), 100 * method.mean("score"), s=70, color=colour, marker="D", label=label)
    axes[0].set(xlabel="peak of the tensors in a training step (MiB)", ylabel="exact held-out answers (%)")
    axes[1].set(xlabel="trained parameters", xscale="log")
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    for axis in axes:
        axis.axhline(100 * PROMISE * methods["full"].mean("score"), color="grey", linewidth=1, linestyle="--")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, title="diamond: mean of the seeds; dashed: 90 % of full", title_fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    draw(DOCUMENT.with_suffix(".png"))
    print(f"Wrote {DOCUMENT}")
