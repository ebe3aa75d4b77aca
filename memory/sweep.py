"""Every combination of some flags' values: a JSON file a row, a table, a chart, TensorBoard."""

import itertools
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from memory.charts import sweep_chart
from memory.config import ProbeConfig
from memory.probe import probe
from memory.report import as_flags, sweep_table
from utils import UserError, flag_parser, write_json


FOLDER = "outputs/sweep"
METRICS = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "step_seconds", "tokens_per_second")


def run_sweep(config: ProbeConfig) -> dict[str, Any]:
    """Probe every combination. Rows that an interrupted sweep has saved are not probed again."""
    folder = Path(config.output or FOLDER)
    grid = parse_grid(config.sweep)
    configs, failed = possible_configs(config, grid)
    rows = []
    for values, row_config in tqdm(configs, desc="Probing", unit="row"):
        path = folder / "rows" / (row_name(values) + ".json")
        row = read_row(path, row_config)
        if row is None:
            try:
                row = probe(row_config)
            except UserError as error:  # the other rows may be what is asked for
                failed.append({"flags": values, "error": str(error)})
                continue
            write_json(path, row)
        rows.append(row)
    if not rows:
        raise UserError(failed[0]["error"])
    table = sweep_table(rows, list(grid))
    print(table, *(f"Not probed: {as_flags(row['flags'])}: {row['error']}" for row in failed), sep="\n", flush=True)
    (folder / "table.md").write_text(table + "\n")
    chart = sweep_chart(rows, list(grid))
    chart.savefig(folder / "chart.png", dpi=120)
    write_tensorboard(folder / "tensorboard", rows, list(grid), chart)
    return {"rows": rows, "failed": failed}


def possible_configs(
    config: ProbeConfig, grid: dict[str, list[Any]]
) -> tuple[list[tuple[dict[str, Any], ProbeConfig]], list[dict[str, Any]]]:
    """The combinations whose flags go together, and the others with their errors.

    Raises:
        UserError: of a value that goes together with nothing: it is a mistake.
    """
    possible, failed = [], []
    for values in combinations(grid):
        try:
            possible.append((values, replace(config, sweep=None, output=None, **values)))
        except UserError as error:
            failed.append({"flags": values, "error": str(error)})
    for row in failed:
        for name, value in row["flags"].items():
            if all(values[name] != value for values, _ in possible):
                raise UserError(f"--sweep {name}: {row['error']}")
    return possible, failed


def write_tensorboard(folder: Path, rows: list[dict], keys: list[str], chart: Figure) -> None:
    """A row is a run with its flags and metrics in the HPARAMS tab; the chart is among the images."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier sweep's
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure("memory/sweep", chart)
        for row in rows:
            flags = {
                name: value for name, value in row["config"].items() if isinstance(value, (bool, int, float, str))
            }
            metrics = {f"memory/{name}": row[name] for name in METRICS if row.get(name) is not None}
            writer.add_hparams(flags, metrics, run_name=row_name({key: row["config"][key] for key in keys}))


def parse_grid(words: list[str]) -> dict[str, list[Any]]:
    """`KEY=V1,V2` words to the values of each flag; a list's parts are joined by `+`.

    Raises:
        UserError: a word that is no flag, or no value of it.
    """
    names = {field.name for field in fields(ProbeConfig)} - {"sweep", "output", "explain", "calibrate"}
    parser = flag_parser(ProbeConfig)
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not values or name not in names:
            raise UserError(f"--sweep {word}: expected FLAG=VALUE,VALUE with one of this script's flags")
        try:
            parsed = [parser.parse_args([f"--{name}", *value.split("+")]) for value in values.split(",")]
        except UserError as error:
            raise UserError(f"--sweep {word}: {error}") from None
        grid[name] = [getattr(flags, name) for flags in parsed]
    return grid


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def row_name(values: dict[str, Any]) -> str:
    """A file's name from what sets the row apart."""
    words = [f"{name}={'+'.join(value) if isinstance(value, list) else value}" for name, value in values.items()]
    return "_".join(words).replace("/", "-")


def read_row(path: Path, config: ProbeConfig) -> dict | None:
    """A row of an earlier sweep, if it was probed with the same flags."""
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    return row if row["config"] == asdict(config) else None
