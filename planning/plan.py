"""`memory_probe.py --plan`: the fastest step that fits, found before it is run.

result = run_plan(PlanConfig(plan=True, gpu="rtx3060", gradient_accumulation_steps=128))
result["chosen"]["config"], result["plan"], result["budget_bytes"]
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from memory.charts import front_chart
from memory.page import Choices, step_page
from memory.probe import predicted_checkpoint_bytes, probe_with_record
from planning.budget import Budget
from planning.config import PlanConfig
from planning.dataset import with_images_of_dataset
from planning.epoch import epoch_of
from planning.front import Front
from planning.predictions import Prediction, Predictions
from planning.recipe import launch_command, recipe_text
from planning.report import checkpointing, epoch_lines, plan_lines
from planning.search import Found, Searcher, search
from step import check_model
from utils import counted, size, write_json, write_whole


RECIPE, PAGE, PICTURE, RECORD = "chosen.yaml", "plan.html", "plan.png", "plan.json"


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Print the plan, write it to --output, and return what the last line of stdout says.

    Raises:
        UserError: a flag, the model or the data set is refused.
    """
    start = time.monotonic()
    check_model(config.probe_config)
    if config.dataset is not None:
        config = with_images_of_dataset(config)
    budget, bar = Budget.of(config), Progress()
    with bar, Predictions(lambda step, is_known: bar.add(step, budget)) as predictions:
        searcher = Searcher(config, budget, predictions)
        found = search(searcher)
        epoch = epoch_of(config, budget, found.chosen, predictions) if config.dataset and found.chosen else None
    front = Front.of(searcher.seen)
    lines = plan_lines(config, budget, found, front)
    lines += epoch_lines(epoch) if epoch else []
    disk_bytes = predicted_checkpoint_bytes(found.chosen.config) if found.chosen else None
    lines += [f"A checkpoint takes {size(disk_bytes)} of the disk."] if disk_bytes else []
    print(*lines, sep="\n", flush=True)
    result = {
        "mode": "plan",
        "model": config.model,
        "plan": [row(step, budget) for step in front.steps],
        "chosen": row(found.chosen, budget) if found.chosen else None,
        "changes": found.changes,
        "budget_bytes": budget.device_bytes,
        "margin_bytes": budget.margin_bytes(found.chosen) if found.chosen else None,
        "reserve_bytes": budget.reserve_bytes,
        "checkpoint_bytes": disk_bytes,
        "epoch": asdict(epoch) if epoch else None,
        "fits": found.chosen is not None,
        "seconds": time.monotonic() - start,
    }
    if config.output is not None:
        write_plan(Path(config.output), config, budget, found, front, result)
    elif found.chosen is not None:
        print(f"Run it: {launch_command(config, found.chosen, None)}", flush=True)
    return result


def row(step: Prediction, budget: Budget) -> dict[str, Any]:
    """A step as JSON has it."""
    values = asdict(step) | {"fits": budget.fits(step)}
    del values["problem"]
    return values


def write_plan(
    folder: Path, config: PlanConfig, budget: Budget, found: Found, front: Front, result: dict[str, Any]
) -> None:
    """The result, the picture of the front, and of the chosen step the recipe and the page. Where nothing fits, those
    of an earlier plan are taken away."""
    best = [row(step, budget) for step in front.best]
    picture = front_chart(result["plan"], best, result["chosen"], result["budget_bytes"])
    # The page takes seconds, so it is made first: an interruption leaves an earlier plan whole.
    page = None if found.chosen is None else page_of(found.chosen, result)
    for name in (RECIPE, PAGE):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / RECORD, result)
    picture.savefig(folder / PICTURE, dpi=120)
    if page is None:
        print(f"Saved to {folder}", flush=True)
        return
    write_whole(folder / PAGE, page.encode())
    write_whole(folder / RECIPE, recipe_text(config, found.chosen, folder / RECIPE).encode())
    print(f"Saved to {folder}. Run it: {launch_command(config, found.chosen, folder / RECIPE)}", flush=True)


def page_of(chosen: Prediction, result: dict[str, Any]) -> str:
    probed, record = probe_with_record(chosen.config)
    choices = Choices(result["plan"], result["chosen"], result["budget_bytes"], differing(result["plan"]))
    return step_page(probed, record.device, choices)


def differing(rows: list[dict[str, Any]]) -> list[str]:
    """The flags that tell the rows apart."""
    first = rows[0]["config"]
    return [name for name in first if any(row["config"][name] != first[name] for row in rows)]


class Progress:
    """A bar that counts predictions and shows the best so far."""

    def __init__(self) -> None:
        self.bar = tqdm(desc="Planning", unit=" steps")
        self.best: Prediction | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, step: Prediction, budget: Budget) -> None:
        fits = budget.fits(step)
        if fits and (self.best is None or step.tokens_per_second > self.best.tokens_per_second):
            self.best = step
            rows = counted(step.config.per_device_train_batch_size, "row")
            words = f"{step.tokens_per_second:,.0f} tokens/s in {size(step.device_bytes)}"
            self.bar.set_postfix_str(f"best so far {words}: {rows}, checkpointed: {checkpointing(vars(step.config))}")
        self.bar.update()
