"""The tables of docs/planner.md, from results/gpu/plans.json."""

from typing import Any

from benchmarks.memory_tables import gib
from benchmarks.rows import RESULTS, read_result
from memory.report import duration
from planning.report import checkpointing
from utils import GIB, markdown_table


PEAK, BUSY, WHOLE = "peak_allocated_bytes", "busy_seconds", "step_seconds"
PLANS = RESULTS / "gpu/plans.json"
SAMPLES, SAMPLE_TOKENS = 8, 2048  # of an update
SWEPT = {"model": "mgm-2b", "budget_gib": 12}  # the plan against which the sweep is held
# README's table: one row, all layers checkpointed.
README_STEP = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}


def plans_table() -> str:
    """Each plan: what it has chosen, predicted beside measured."""
    result = read_result(PLANS)
    header = [
        "model",
        "budget",
        "rows",
        "recomputed",
        "strategy",
        "device, predicted",
        "device, measured",
        "peak's error",
    ]
    cells = []
    for plan in result["plans"]:
        predicted, measured, chosen = plan["predicted"], plan.get("measured", {}), plan["chosen"]
        cells.append([plan["flags"]["model"], f"{plan['flags']['budget_gib']} GiB"])
        cells[-1] += [chosen["per_device_train_batch_size"], recomputed(chosen), chosen["strategy"]]
        cells[-1] += [gib(predicted["device_bytes"]), gib(measured["device_bytes"]) if measured else ""]
        cells[-1] += [f"{predicted[PEAK] / measured[PEAK] - 1:+.2%}" if measured else ""]
        cells[-1] += [duration(predicted), duration(measured)]
    return "\n\n".join([about(result), markdown_table([*header, "update, predicted", "update, measured"], cells)])


def sweep_table() -> str:
    """The measured steps of the sweep, those first that keep the GPU busy for the shortest time, and how the plan's
    choice compares."""
    result = read_result(PLANS)
    rows = sorted(swept(result), key=lambda row: row["measured"]["busy_seconds"])
    cells = [
        [row["flags"]["per_device_train_batch_size"], recomputed(row["flags"]), row["flags"].get("strategy", "single")]
        + [gib(row["measured"]["device_bytes"]), milliseconds(row, "busy_seconds"), milliseconds(row, "step_seconds")]
        + ["yes" if fits(row) else "no"]
        for row in rows
    ]
    header = ["rows", "recomputed", "strategy", "device", "GPU busy", "update", f"fits {SWEPT['budget_gib']} GiB"]
    return "\n\n".join([about(result), markdown_table(header, cells), comparison(result)])


def comparison(result: dict[str, Any]) -> str:
    """The choice against the fastest step of the sweep that fits, and against README's."""
    busy = ratios([{"flags": choice(result)["chosen"], "measured": choice(result)["measured"]}], fitting(result), BUSY)
    text = (
        f"Against the fastest of these that fits, the plan's choice keeps the GPU busy for {busy['fastest']:.2f} of "
        f"the time; against one row with all layers checkpointed, as in the README's table, {busy['readme']:.2f}."
    )
    if not result.get("turns"):
        return text
    whole = turn_ratios(result)
    return (
        f"{text} With the fastest ones in turns, {len(result['turns'])} times each, its update takes "
        f"{whole['fastest']:.2f} of the time of the fastest other, and {whole['readme']:.2f} of README's."
    )


def turn_ratios(result: dict[str, Any]) -> dict[str, float]:
    """The choice's whole update against those with which it took turns."""
    turns = [row for turn in result["turns"] for row in turn]
    chosen = [row for row in turns if row["flags"] == choice(result)["chosen"]]
    return ratios(chosen, [row for row in turns if row not in chosen], WHOLE)


def ratios(chosen: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> dict[str, float]:
    """The choice's least measured seconds over those of others; below 1 it is faster."""
    seconds = min(row["measured"][name] for row in chosen)
    readme = [row for row in others if is_readme_step(row["flags"])]
    return {
        which: seconds / min(row["measured"][name] for row in rows)
        for which, rows in (("fastest", others), ("readme", readme))
    }


def choice(result: dict[str, Any]) -> dict[str, Any]:
    """The plan against which the sweep is held."""
    return next(plan for plan in result["plans"] if plan["flags"] == SWEPT)


def fitting(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in swept(result) if fits(row)]


def fits(row: dict[str, Any]) -> bool:
    return row["measured"]["device_bytes"] <= SWEPT["budget_gib"] * GIB


def milliseconds(row: dict[str, Any], name: str) -> str:
    return f"{1000 * row['measured'][name]:.0f} ms"


def is_readme_step(flags: dict[str, Any]) -> bool:
    others = ("checkpoint_num_layers", "checkpoint_num_mlps", "mlp_tiles", "strategy")
    return README_STEP.items() <= flags.items() and not any(flags.get(name) for name in others)


def swept(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result.get("sweep", []) if "failed" not in row["measured"]]


def about(result: dict[str, Any]) -> str:
    machine = result.get("machine", {"gpu": f"planned for {result['gpu']}", "torch": "nothing measured yet"})
    what = f"updates of {SAMPLES} samples of {SAMPLE_TOKENS} tokens with an image"
    return f"{machine['gpu']}, PyTorch {machine['torch']}; {what}."


def recomputed(flags: dict[str, Any]) -> str:
    """What the backward pass recomputes, and whether MLPs are kept whole where a step would choose tiles."""
    return checkpointing({"gradient_checkpointing": True} | flags) + (
        ", MLPs whole" if flags.get("mlp_tiles") == 1 else ""
    )
