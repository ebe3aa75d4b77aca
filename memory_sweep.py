"""Every combination of some flags' values: a JSON file a row, and where the rows lead to."""

import itertools
import json
import shutil
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from memory_charts import sweep_chart
from memory_report import sweep_table
from train import StepConfig
from utils import UserError


FOLDER = "results/sweep"
FIGURES = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes")
BOOLEANS = {"true": True, "false": False}


def run_sweep(config: StepConfig, probe: Callable[[StepConfig], dict]) -> dict[str, Any]:
    """Probe every combination. Rows that an interrupted sweep has left behind are taken as they are."""
    folder = Path(config.output or FOLDER)
    grid = parse_grid(config, config.sweep)
    rows = []
    for values in tqdm(combinations(grid), desc="Probing", unit="row"):
        row_config = replace(config, sweep=None, output=None, **values)
        path = folder / "rows" / (row_name(values) + ".json")
        rows.append(read_row(path, row_config) or write_row(path, probe(row_config)))
    table = sweep_table(rows, list(grid))
    print(table, flush=True)
    (folder / "table.md").write_text(table + "\n")
    chart = sweep_chart(rows, list(grid))
    chart.savefig(folder / "chart.png", dpi=120)
    write_tensorboard(folder / "tensorboard", rows, list(grid), chart)
    return {"rows": rows}


def write_tensorboard(folder: Path, rows: list[dict], keys: list[str], chart: Figure) -> None:
    """A row is a run with its flags and figures in the HPARAMS tab; the chart is among the images."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier sweep's
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure("memory/sweep", chart)
        for row in rows:
            flags = {
                name: value for name, value in row["config"].items() if isinstance(value, (bool, int, float, str))
            }
            figures = {f"memory/{name}": row[name] for name in FIGURES}
            writer.add_hparams(flags, figures, run_name=row_name({key: row["config"][key] for key in keys}))


def parse_grid(config: StepConfig, words: list[str]) -> dict[str, list[Any]]:
    """`KEY=V1,V2` words to the values of each flag. Raises UserError for what is no flag or no value of it."""
    hints = typing.get_type_hints(type(config))
    names = {field.name for field in fields(config)} - {"sweep", "output", "explain", "calibrate"}
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not values or name not in names:
            raise UserError(f"--sweep {word}: expected FLAG=VALUE,VALUE with one of this script's flags")
        grid[name] = [parse_value(flag_type(hints[name]), value, word) for value in values.split(",")]
    return grid


def parse_value(kind: type, value: str, word: str) -> Any:
    """A flag's value as its type has it; a list's parts are joined by `+`."""
    try:
        if kind is bool:
            return BOOLEANS[value.lower()]
        return value.split("+") if kind is list else kind(value)
    except (KeyError, ValueError):
        raise UserError(f"--sweep {word}: {value!r} is no {kind.__name__}") from None


def flag_type(hint: Any) -> type:
    """`float | None` to float, `list[str]` to list."""
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return typing.get_origin(hint) or hint


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def row_name(values: dict[str, Any]) -> str:
    """A file's name from what sets the row apart."""
    words = [f"{name}={'+'.join(value) if isinstance(value, list) else value}" for name, value in values.items()]
    return "_".join(words).replace("/", "-")


def read_row(path: Path, config: StepConfig) -> dict | None:
    """A row of an earlier sweep, if it was probed with the same flags."""
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    return row if row["config"] == asdict(config) else None


def write_row(path: Path, row: dict) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row, indent=1) + "\n")
    partial.rename(path)
    return row
