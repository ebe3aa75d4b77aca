"""The charts among the pictures of docs/report.md. Text and axes have the colours of benchmarks/pictures.py."""

from itertools import groupby
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.lora_vs_full import LABELS
from benchmarks.lora_vs_full_report import retentions
from benchmarks.memory_tables import ladder_titles
from benchmarks.pairs import FULL_LOSS, ZERO3, cpu_pairs, gpu_pairs
from benchmarks.plan_tables import BUSY, PLANS, SAMPLE_TOKENS, SAMPLES, SWEPT, swept
from benchmarks.rows import read_result
from benchmarks.speed_tables import size_of
from memory.charts import stacked_bars
from utils import GIB


# Of rows, in the order of benchmarks/pairs.py.
KINDS = ("#e15759", "#f28e2b", "#4e79a7", "#17a2a2", "#b07aa1", "#59a14f")
MARKERS = {"": "o", FULL_LOSS: "s", ZERO3: "^"}
OURS, BAR = "train.py", 0.16  # the width of a bar, in groups
TRAINERS = {  # a lighter tone with Liger's kernels
    OURS: "#e15759",
    "Trainer + PEFT": "#4e79a7",
    "Trainer + PEFT, Liger": "#9dbfe0",
    "TRL SFTTrainer": "#59a14f",
    "TRL SFTTrainer, Liger": "#a5d69b",
}
MODELS = {"gemma-2b": "language model of Gemma-2B's size", "qwen3-vl-2b": "Qwen3-VL-2B"}


def ladder_chart() -> Figure:
    """A bar for each row of results/ladder.json, divided into the categories of its peak, beside two cards' sizes."""
    ladder = read_result("ladder.json")
    rows, titles = [*ladder["rungs"], *ladder["branches"]], ladder_titles(ladder)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots()
    ends = stacked_bars(axes, titles, [row["breakdown"] for row in rows], visible_gib=0.05)
    for row, title, end in zip(rows, titles, ends, strict=True):
        axes.text(end + 0.4, title, f"{row['peak_allocated_bytes'] / GIB:.2f} GiB", va="center", fontsize=9)
    for gib in (8, 24):
        axes.axvline(gib, color=thin(), linestyle=":", linewidth=1, zorder=0)
        axes.text(gib, -0.6, f"{gib} GiB", ha="center", va="bottom", fontsize=8)
    axes.set_xlim(0, max(ends) * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of tensors at the peak of a step")
    figure.legend(loc="outside lower center", ncols=8, columnspacing=1, handlelength=1, fontsize=8)
    return figure


def prediction_chart() -> Figure:
    """Predicted against measured bytes of every row, and the errors of those that were measured on a GPU."""
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    sizes, errors = figure.subplots(1, 2)
    kinds = groupby([*gpu_pairs(), *cpu_pairs()], key=lambda pair: pair.kind)
    for colour, (kind, group) in zip(KINDS, kinds, strict=True):
        pairs = list(group)
        points = zip(*((pair.measured_bytes / GIB, pair.predicted_bytes / GIB) for pair in pairs), strict=True)
        sizes.plot(*points, "o", color=colour, markersize=4, alpha=0.8, label=f"{kind} ({len(pairs)})")
    sizes.plot((1e-3, 100), (1e-3, 100), color=thin(), linewidth=0.8, zorder=0)
    sizes.set(xscale="log", yscale="log", xlabel="measured", ylabel="predicted", xlim=(1e-3, 100), ylim=(1e-3, 100))
    for axis in (sizes.xaxis, sizes.yaxis):
        axis.set_ticks([2**-10, 2**-6, 0.25, 4, 64], ["1 MiB", "16 MiB", "256 MiB", "4 GiB", "64 GiB"])
        axis.set_minor_locator(NullLocator())
    draw_errors(errors)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_errors(axes: Axes) -> None:
    """The device's error in percent of each row that was measured on a GPU, by what makes it hard to predict."""
    for colour, (_, group) in zip(KINDS, groupby(gpu_pairs(), key=lambda pair: pair.kind), strict=False):
        points: dict[str, list[tuple[float, float]]] = {}
        for pair in group:
            points.setdefault(pair.difficulty, []).append((pair.measured_bytes / GIB, 100 * pair.error))
        for difficulty, found in points.items():
            axes.plot(*zip(*found, strict=True), MARKERS[difficulty], color=colour, markersize=5, alpha=0.8)
    for difficulty, marker in MARKERS.items():
        axes.plot([], [], marker, color=thin(), markersize=5, label=difficulty or "others")
    axes.axhline(0, color=thin(), linewidth=0.8, zorder=0)
    axes.set(xscale="log", xlabel="measured on a GPU", ylabel="error of the prediction, %", ylim=(-12, 2))
    axes.set_xticks([4, 8, 16, 32, 64], [f"{gib} GiB" for gib in (4, 8, 16, 32, 64)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower right")


def speed_chart() -> Figure:
    """Tokens a second of each trainer, a group of bars for each setting of results/gpu/step.json."""
    step = read_result("gpu/step.json")
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    panels = figure.subplots(1, len(MODELS), width_ratios=(6, 4))
    for axes, (model, title) in zip(panels, MODELS.items(), strict=True):
        rows = [row for row in step["rows"] if row["flags"]["model"] == model and "failed" not in row]
        draw_trainers(axes, rows, [ratio for ratio in step["ratios"] if ratio["model"] == model])
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("thousand tokens a second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(TRAINERS))
    return figure


def draw_trainers(axes: Axes, rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """One model's bars; above those of train.py their ratio to the fastest other trainer's."""
    settings = list(dict.fromkeys(size_of(row["flags"]) for row in rows))
    kinds = [kind for kind in TRAINERS if any(row["flags"]["kind"] == kind for row in rows)]
    for place, kind in enumerate(kinds):
        own = {size_of(row["flags"]): row["tokens_per_second"] / 1000 for row in rows if row["flags"]["kind"] == kind}
        places = [settings.index(setting) + (place - (len(kinds) - 1) / 2) * BAR for setting in own]
        bars = axes.bar(places, own.values(), 0.95 * BAR, color=TRAINERS[kind], label=kind)
        if kind == OURS:
            found = {size_of(ratio): f"{ratio['speed_against_best']:.2f}" for ratio in ratios}
            axes.bar_label(bars, [found[setting] for setting in own], fontsize=8, padding=1)
    axes.set_xticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings], fontsize=7)


def retention_chart() -> Figure:
    """How much of full fine-tuning's accuracy each method keeps, with the interval over questions and seeds."""
    found = retentions()
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes = figure.subplots()
    for name, result in found.items():
        axes.plot(
            [100 * end for end in result["interval_with_seeds"]], [LABELS[name]] * 2, color=KINDS[2], linewidth=2
        )
        axes.plot(100 * result["retention"], LABELS[name], "o", color=KINDS[0])
        axes.annotate(f"{result['retention']:.1%}", (100 * result["retention"], LABELS[name]), (0, 6),
                      textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    axes.axvline(90, color=thin(), linestyle=":", linewidth=1, zorder=0)
    axes.set(xlim=(0, 105), xlabel="% of full fine-tuning's accuracy", ylim=(len(found) - 0.5, -0.7))
    return figure


def front_chart() -> Figure:
    """Measured steps of MGM-2B, memory against tokens a second, and what the planner chose for each budget."""
    result = read_result(PLANS)
    plans = [plan for plan in result["plans"] if plan["flags"]["model"] == SWEPT["model"]]
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*points_of(swept(result)), "o", color=KINDS[2], markersize=4, alpha=0.7, label="other steps")
    axes.plot(*points_of(plans), "*", color=KINDS[0], markersize=11, label="chosen for so many GiB")
    for plan, x, y in zip(plans, *points_of(plans), strict=True):
        axes.annotate(f"{plan['flags']['budget_gib']}", (x, y), (-3, 7), textcoords="offset points", ha="right")
    axes.set(xlabel="GiB of the device, measured", ylabel="thousand tokens / GPU s", xlim=(0, 37), ylim=(0, 46))
    axes.legend(loc="lower right")
    return figure


def points_of(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """GiB on the device, and thousand tokens for each second in which the GPU works."""
    measured = [row["measured"] for row in rows]
    tokens = SAMPLES * SAMPLE_TOKENS / 1000
    return [row["device_bytes"] / GIB for row in measured], [tokens / row[BUSY] for row in measured]


def thin() -> str:
    """The colour of what is drawn thin."""
    return rcParams["grid.color"]
