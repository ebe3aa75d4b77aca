"""Pictures of memory: a bar for every configuration against the budget, and one step as it goes on."""

from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memory.categories import CATEGORIES
from memory.record import Record
from utils import GIB


OVERHEAD_COLOUR = "#e8e8e8"
MAX_POINTS = 2000  # of a timeline: more cannot be seen


def sweep_chart(rows: list[dict], keys: list[str]) -> Figure:
    """A stacked bar a row: the peak by category, then what allocator and context add; a line for each budget."""
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [", ".join(f"{key} {row['config'][key]}" for key in keys) for row in rows]
    ends = stacked_bars(axes, labels, [row.get("breakdown", {}) for row in rows], visible_gib=0.005)
    # What was measured has no breakdown.
    rest = "allocator and context" if all("breakdown" in row for row in rows) else "all that was measured"
    overheads = [row["device_bytes"] / GIB - end for row, end in zip(rows, ends, strict=True)]
    axes.barh(labels, overheads, left=ends, color=OVERHEAD_COLOUR, label=rest)
    for budget_bytes in {row["budget_bytes"] for row in rows}:
        axes.axvline(budget_bytes / GIB, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the device (dashed: the budget)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def stacked_bars(axes: Axes, labels: list[str], breakdowns: list[dict[str, int]], visible_gib: float) -> list[float]:
    """A bar for each breakdown, divided into categories; one that no bar has more than `visible_gib` of is not drawn.

    Returns where the bars end, in GiB.
    """
    ends = [0.0] * len(labels)
    for category in CATEGORIES:
        widths = [breakdown.get(category.name, 0) / GIB for breakdown in breakdowns]
        if max(widths) > visible_gib:
            axes.barh(labels, widths, left=ends, color=category.colour, label=category.title)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    return ends


def step_chart(record: Record) -> Figure:
    """What is allocated, by category, allocation by allocation through two updates; the second is the steady state."""
    series = category_series(record)
    points = highest_points(record.timeline())
    used = [category for category in CATEGORIES if max(series[category.name]) > 0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    heights = [[series[category.name][point] / GIB for point in points] for category in used]
    axes.stackplot(points, heights, colors=[c.colour for c in used], labels=[c.title for c in used])
    for start, phase in dict(record.phase_starts).items():  # of phases without an event between them the last
        axes.axvline(start, color="black", linewidth=0.5, alpha=0.6)
        axes.text(start, 1.01, phase, transform=axes.get_xaxis_transform(), fontsize="small", rotation=45)
    axes.set_xlabel("allocations and frees")
    axes.set_ylabel("GiB allocated")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def front_chart(rows: list[dict], front: list[dict], chosen: dict | None, budget_bytes: int) -> Figure:
    """Tokens a second against GiB: a point for each of `rows`, a line through `front`, a star for `chosen`."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for fits, colour, label in ((True, "#2a78b5", "fits"), (False, "#b0b0b0", "does not fit")):
        points = [point_of(row) for row in rows if row["fits"] == fits]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), "o", color=colour, markersize=5, label=label)
    axes.plot(*zip(*map(point_of, front), strict=True), color="#808080", linewidth=1, zorder=0, label="the front")
    if chosen is not None:
        axes.plot(*point_of(chosen), "*", color="#d1495b", markersize=15, label="chosen")
    axes.axvline(budget_bytes / GIB, color="black", linestyle="--", linewidth=1, label="the budget")
    axes.set_xlabel("GiB on the device")
    axes.set_ylabel("tokens a second, predicted")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def point_of(row: dict) -> tuple[float, float]:
    return row["device_bytes"] / GIB, row["tokens_per_second"]


def highest_points(timeline: list[int], max_points: int = MAX_POINTS) -> list[int]:
    """Where to look at a timeline that is longer than can be seen: the highest point of each stretch."""
    stride = max(1, -(-len(timeline) // max_points))
    starts = range(0, len(timeline), stride)
    return [max(range(start, min(start + stride, len(timeline))), key=timeline.__getitem__) for start in starts]


def category_series(record: Record) -> dict[str, list[int]]:
    """Bytes of each category after each event."""
    changes = {category.name: [0] * len(record.events) for category in CATEGORIES}
    for index, (nbytes, allocation) in enumerate(record.events):
        changes[allocation.category][index] = nbytes
    return {category: list(accumulate(values)) for category, values in changes.items()}
