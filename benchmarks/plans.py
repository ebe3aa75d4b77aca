"""Whether plans keep their word on a GPU: results/gpu/plans.json and the tables of docs/planner.md.

    python -m benchmarks.plans --mode plan       # needs no GPU; makes the plans anew, a minute or two each
    python -m benchmarks.plans --mode measure    # needs a GPU of 80 GB; adds the rows that are missing

Small cards are emulated by a limit on what PyTorch may take. The chosen steps are measured under theirs: they must
stay within it. A sweep of other steps, which a plan could have chosen, is measured without one: those that would have
fitted say whether a faster step was missed. The fastest of them and the choice then take turns: a host's speed changes
from one minute to the next.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plan_tables import PLANS, SAMPLES, SWEPT, choice, fitting, is_readme_step
from benchmarks.rows import Rows, RowsConfig, gpu_machine
from benchmarks.step_time import measure_row, row_config
from benchmarks.tables import write_tables
from memory.config import ProbeConfig
from memory.measure import measure
from planning.config import SEARCHED, PlanConfig
from planning.plan import run_plan
from planning.space import ALL_LAYERS, NO_CHECKPOINTING, checkpointed
from utils import UserError, check_choice, flag, run_script, write_json


NUM_TURNS, NUM_RIVALS = 2, 3
PLANNED = [
    {"model": model, "budget_gib": budget_gib}
    for model in ("mgm-2b", "qwen3-vl-2b")
    for budget_gib in (6, 8, 12, 16, 24)
]
CHECKPOINTING = [ALL_LAYERS, checkpointed(9, 0), checkpointed(0, 18), checkpointed(0, 9), NO_CHECKPOINTING]
SWEEP = [
    *(
        {"per_device_train_batch_size": rows, "gradient_accumulation_steps": SAMPLES // rows} | layers
        for rows in (1, 2, 4, 8)
        for layers in [*CHECKPOINTING, ALL_LAYERS | {"mlp_tiles": 1}]
    ),
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "strategy": "zero3", "offload": "param"},
]


@dataclass(kw_only=True)
class PlansConfig(RowsConfig):
    mode: str = flag("plan", "plan | measure")
    gpu: str = flag("h200", "the card on which --mode measure will emulate smaller ones")
    output: str = str(PLANS)

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("plan", "measure"))


def main(config: PlansConfig) -> dict[str, Any]:
    path = Path(config.output)
    if config.mode == "plan":
        result = {"version": 1, "gpu": config.gpu, "plans": [made(flags, config.gpu) for flags in PLANNED]}
        write_json(path, result)
    elif not path.exists():
        raise UserError(f"--output {path}: there are no plans; --mode plan makes them")
    else:
        result = measure_rows(path)
    write_tables()
    return {"plans": len(result["plans"]), "swept": len(result.get("sweep", [])), "output": config.output}


def made(flags: dict[str, Any], gpu: str) -> dict[str, Any]:
    """A plan's budget, the flags that it has chosen, and what it says of them."""
    planned = run_plan(plan_config(flags, gpu))
    chosen = planned["chosen"]
    found = {name: chosen["config"][name] for name in SEARCHED}
    names = ("peak_allocated_bytes", "device_bytes", "host_bytes", "step_seconds", "tokens_per_second")
    row = {"flags": flags, "chosen": found, "predicted": {name: chosen[name] for name in names}}
    return row | {"margin_bytes": planned["margin_bytes"], "seconds": planned["seconds"]}


def plan_config(flags: dict[str, Any], gpu: str) -> PlanConfig:
    return PlanConfig(plan=True, gpu=gpu, gradient_accumulation_steps=SAMPLES, eval_samples=0, **flags)


def measure_rows(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    rows = Rows(path, {"version": result["version"]}, machine=gpu_machine())
    rows.result.setdefault("machine", gpu_machine())
    for plan in rows.result["plans"]:
        if "measured" not in plan:
            plan["measured"] = measured_plan(row_config("measure", result["gpu"], plan["flags"] | plan["chosen"]))
            print(plan, flush=True)
            rows.write()
    for flags in rows.missing(SWEEP, "sweep"):
        config = row_config("measure", result["gpu"], {"model": SWEPT["model"]} | flags)
        rows.add({"flags": flags, "measured": measure_row(config)}, "sweep")
    turns = rows.result.setdefault("turns", [])
    while len(turns) < NUM_TURNS:
        turns.append(one_turn(rows.result, is_backward=len(turns) % 2 == 1))
        rows.write()
    return rows.result


def one_turn(result: dict[str, Any], is_backward: bool) -> list[dict[str, Any]]:
    """The choice, README's step and the sweep's fastest ones that fit, one after the other."""
    steps = [row["flags"] for row in sorted(fitting(result), key=lambda row: row["measured"]["step_seconds"])]
    steps = [choice(result)["chosen"], next(filter(is_readme_step, steps)), *steps[:NUM_RIVALS]]
    configs = [row_config("measure", result["gpu"], {"model": SWEPT["model"]} | flags) for flags in steps]
    turn = [
        {"flags": flags, "measured": measure_row(config)}
        for flags, config in list(zip(steps, configs, strict=True))[:: -1 if is_backward else 1]
    ]
    print(turn, flush=True)
    return turn


def measured_plan(config: ProbeConfig) -> dict[str, Any]:
    """Memory under the budget as a limit, and time."""
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "host_bytes", "oom")
    found = measure(config)
    return {name: found[name] for name in names} | measure_row(config)


if __name__ == "__main__":
    run_script(main, PlansConfig)
