"""A page to look inside a prediction: one HTML file that a browser opens without a server or a network.

It shows the settings and the verdict, the memory event by event and by category, and which tensors are alive at any
place and at the peak; of several settings to choose from, also those (Choices). memory/step_page.html is the template.
"""

import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.categories import CATEGORIES
from memory.charts import highest_points
from memory.predict import PEFT_NAMES
from memory.record import Allocation, Record
from memory.report import duration, time_text, title, totals, verdict
from utils import size


TEMPLATE = Path(__file__).with_name("step_page.html")
# So many places and tensors make about 1.5 MB, and a browser draws them at once.
MAX_POINTS = 20_000
MAX_TENSORS = 20_000


@dataclass(frozen=True)
class Choices:
    """Settings to choose from. A row has `config`, `device_bytes`, `host_bytes`, `fits`, and `step_seconds` and
    `tokens_per_second`, which may be None. `keys`: the flags that tell the rows apart."""

    rows: list[dict[str, Any]]
    chosen: dict[str, Any]  # one of them: its step is on the page
    budget_bytes: int
    keys: list[str]


def step_page(result: dict[str, Any], record: Record, choices: Choices | None = None) -> str:
    """The page of a prediction (memory.probe's result) and the record of the device that it comes from."""
    data = {
        "title": title(result),
        "verdict": verdict(result),
        "fits": result["fits"],
        "figures": [*totals(result), *time_text(result)],
        "notes": result.get("notes", []),
        "settings": [[f"--{name}", _text(value)] for name, value in result["config"].items() if value is not None],
        "front": choices and _front_data(choices),
        **record_data(record),
    }
    # No text can end the script element that holds it: "<" is written as an escape.
    return TEMPLATE.read_text().replace("{{data}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def record_data(record: Record) -> dict[str, Any]:
    """The record as the page's script reads it.

    A point stands for a stretch of events and is its highest one. `points` are the numbers of the events, counted from
    1, as differences. `phases` are [first point, name]. A category's `tensors` are [first point, number of points,
    bytes, and three of `words`: module, operator, shape and type]; its `rest` is what other tensors add: [point, bytes
    more than at the point before].
    """
    points = highest_points(record.timeline(), MAX_POINTS)
    alive = [(a, *_span(a, points)) for nbytes, a in record.events if nbytes > 0]
    alive = [(a, first, end) for a, first, end in alive if first < end]
    listed = set(sorted((a for a, *_ in alive), key=lambda a: -a.nbytes)[:MAX_TENSORS])
    words: dict[str, int] = {}
    categories = []
    for category in CATEGORIES:
        own = [span for span in alive if span[0].category == category.name]
        tensors = [
            [first, end - first, a.nbytes, *(words.setdefault(word, len(words)) for word in _words(a))]
            for a, first, end in own
            if a in listed
        ]
        rest = _changes([span for span in own if span[0] not in listed], len(points))
        categories.append({"title": category.title, "colour": category.colour, "tensors": tensors, "rest": rest})
    numbers = [0, *(point + 1 for point in points)]
    return {
        "points": [number - before for before, number in zip(numbers, numbers[1:], strict=False)],
        "peak": bisect_left(points, record.peak_index),
        "numEvents": len(record.events),
        "phases": [[bisect_left(points, start), phase] for start, phase in record.phase_starts],
        "scale": _scale(len(record.events), len(points), len(alive), listed),
        "categories": categories,
        "words": list(words),
    }


def _span(allocation: Allocation, points: list[int]) -> tuple[int, int]:
    """The points at which it is alive: the first, and the one after the last."""
    end = len(points) if allocation.end is None else bisect_left(points, allocation.end)
    return bisect_left(points, allocation.start), end


def _words(allocation: Allocation) -> tuple[str, str, str]:
    shape = " x ".join(map(str, allocation.shape))
    return PEFT_NAMES.sub("", allocation.module) or "the step", allocation.op, f"{shape} {allocation.dtype}".strip()


def _changes(spans: list[tuple[Allocation, int, int]], num_points: int) -> list[list[int]]:
    changes = [0] * (num_points + 1)
    for allocation, first, end in spans:
        changes[first] += allocation.nbytes
        changes[end] -= allocation.nbytes
    return [[point, nbytes] for point, nbytes in enumerate(changes[:num_points]) if nbytes]


def _scale(num_events: int, num_points: int, num_alive: int, listed: set[Allocation]) -> str:
    """What the page leaves out."""
    text = f"{num_events:,} allocations and frees of the whole trace, in order: loading, the updates and what follows."
    if num_points < num_events:
        text += f" {num_points:,} places are shown, each the highest of its events."
    if len(listed) < num_alive:
        smallest = size(min(allocation.nbytes for allocation in listed))
        text += f" Of {num_alive:,} tensors the {len(listed):,} largest have a name here; the others, of up to"
        text += f" {smallest} each, count in their categories."
    return text


def _front_data(choices: Choices) -> dict[str, Any]:
    rows = [
        {
            "settings": [_text(row["config"][key]) for key in choices.keys],
            "device": row["device_bytes"],
            "host": row["host_bytes"],
            "duration": duration(row),
            "tokens": row["tokens_per_second"],
            "fits": row["fits"],
        }
        for row in choices.rows
    ]
    chosen = choices.rows.index(choices.chosen)
    return {"keys": choices.keys, "rows": rows, "chosen": chosen, "budget": choices.budget_bytes}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
