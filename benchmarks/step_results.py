"""What benchmarks/step.py makes of its measurements: rows, which variants disagree, ratios, floors."""

from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks.step_models import Setting, frozen_matrix_weights, num_parameters
from benchmarks.step_peers import PEERS
from benchmarks.step_watch import Step


OURS = "train.py"


def flags_of(setting: Setting, kind: str) -> dict[str, Any]:
    return {"kind": kind} | asdict(setting)


def row_of(setting: Setting, found: dict[str, Any], rate: float) -> dict[str, Any]:
    """Seconds and what follows from them. `model_flops`: 4 for each frozen weight and token, by convention."""
    steps, num_tokens = found["steps"], setting.rows * setting.num_tokens
    seconds = median(step.seconds for step in steps)
    row = {"seconds": [round(step.seconds, 4) for step in steps], "median_seconds": seconds}
    row |= {"tokens_per_second": num_tokens / seconds, "matmul_flops_per_second": rate}
    row |= {"num_parameters": num_parameters(setting.model)}
    model_flops = 4 * frozen_matrix_weights(setting.model) * num_tokens
    hardware_flops = found["hardware_flops"]
    row |= {"model_flops": model_flops, "model_flops_share_of_rate": model_flops / seconds / rate}
    row |= {"hardware_flops": hardware_flops, "hardware_flops_share_of_rate": hardware_flops / seconds / rate}
    row |= {name: found[name] for name in ("peak_bytes", "activity")}
    row |= {"device_bytes": found["context_bytes"] + found["reserved_bytes"]}
    return row | {name: [getattr(step, name) for step in steps] for name in ("loss", "grad_norm")}


def disagreements(steps: dict[str, list[Step]]) -> dict[str, str]:
    """By kind: how its first steps differ from transformers' Trainer's, where they do. If that has failed, from those
    of the first peer that has not."""
    tolerance = 3e-2 if torch.cuda.is_available() else 1e-4  # bf16 or fp32
    reference = next((kind for kind in PEERS if kind in steps), OURS)
    found = {}
    for kind, own in steps.items():
        for a, b in zip(steps[reference], own, strict=True):
            for name in ("loss", "grad_norm"):
                x, y = getattr(a, name), getattr(b, name)
                if not abs(x - y) <= tolerance * abs(x):
                    found[kind] = f"disagrees: {name} {y:.6g}, {reference}'s {x:.6g}"
    return found


def compare(result: dict[str, Any]) -> None:
    """Add what follows from several rows: the ratios, and the floors of train.py's."""
    rows = result["rows"]
    result["ratios"] = ratios(rows)
    for row in rows:
        if row["flags"]["kind"] == OURS and "failed" not in row:
            row["floor_seconds"] = floor_seconds(rows, row)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """train.py against the fastest and the smallest of the others, in each setting by itself."""
    found = []
    done = [row for row in rows if "failed" not in row]
    for ours in (row for row in done if row["flags"]["kind"] == OURS):
        rivals = [row for row in done if row is not ours and row["flags"] | {"kind": OURS} == ours["flags"]]
        if not rivals:
            continue
        fastest = max(rivals, key=lambda row: row["tokens_per_second"])
        smallest = min(rivals, key=lambda row: row["peak_bytes"])
        entry = {name: value for name, value in ours["flags"].items() if name not in ("kind", "way")}
        entry |= {"speed_against_best": ours["tokens_per_second"] / fastest["tokens_per_second"]}
        entry |= {"peak_against_best": ours["peak_bytes"] / smallest["peak_bytes"]}
        found.append(entry | {"fastest": fastest["flags"]["kind"], "smallest": smallest["flags"]["kind"]})
    return found


def floor_seconds(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """What a step of train.py's would take if the operations that it needs ran at the matrix rate: those that have
    been counted without checkpointing, each row's alike. None: they have not been."""
    flags = row["flags"]
    for other in (other for other in rows if other["flags"]["kind"] == OURS and "failed" not in other):
        is_same = all(other["flags"][name] == flags[name] for name in ("model", "num_tokens"))
        if is_same and not other["flags"]["gradient_checkpointing"]:
            flops = other["hardware_flops"] / other["flags"]["rows"] * flags["rows"]
            return flops / row["matmul_flops_per_second"]
    return None
