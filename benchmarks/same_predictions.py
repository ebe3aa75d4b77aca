"""Predict the rows under results/ again and compare them with what is committed, to the byte.

    python -m benchmarks.same_predictions                    # 40 minutes of one core, no GPU
    python -m benchmarks.same_predictions --only cpu gpu     # some: cpu families gpu headline mgm_2b

Run it before and after a change that must not change a prediction. Exit code 1: a row differs.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import cpu_matrix, families, gpu_matrix, headline, mgm_2b
from benchmarks.rows import gpu_of, read_result
from benchmarks.tables import CPU_MATRIX, FAMILIES_MATRIX, GPU_MATRIX, HEADLINE, MGM_2B
from memory.config import ProbeConfig
from memory.predict import predict
from utils import check_choice, run_script


@dataclass(kw_only=True)
class CompareConfig:
    only: list[str] = field(default_factory=lambda: list(FILES), metadata={"help": "which files' rows"})

    def __post_init__(self) -> None:
        for name in self.only:
            check_choice("only", name, tuple(FILES))


def main(config: CompareConfig) -> dict[str, Any]:
    count, different = 0, []
    for name in config.only:
        for flags, committed, predicted in FILES[name]():
            count += 1
            if committed == predicted:
                print(f"same: {name} {flags}", flush=True)
            else:
                different.append({"file": name, "flags": flags})
                print(f"DIFFERENT: {name} {flags}\n  committed {committed}\n  predicted {predicted}", flush=True)
    return {"rows": count, "different": different}


# Each yields a row's flags, the committed figures and today's.
Comparison = Iterator[tuple[dict[str, Any], Any, Any]]


def cpu_rows() -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        for row in read_result(CPU_MATRIX)["rows"]:
            model = cpu_matrix.model_path(row["flags"]["model"], Path(folder))
            config = ProbeConfig(**cpu_matrix.DEFAULTS | row["flags"] | {"model": model, "mode": "predict"})
            yield row["flags"], row["predicted_bytes"], predict(config)["peak_allocated_bytes"]


def families_rows() -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        for row in read_result(FAMILIES_MATRIX)["rows"]:
            result = predict(families.row_config(row["flags"], Path(folder)))
            yield row["flags"], row["predicted_bytes"], result["peak_allocated_bytes"]


def gpu_rows() -> Comparison:
    config, committed = gpu_matrix.MatrixConfig(), read_result(GPU_MATRIX)
    for row in committed["rows"]:
        if "predicted" in row:
            result = predict(gpu_matrix.row_config(config, gpu_of(committed), row["flags"]))
            yield row["flags"], row["predicted"], {name: result[name] for name in row["predicted"]}


def headline_rows() -> Comparison:
    committed = read_result(HEADLINE)
    for row in committed["rows"]:
        yield row["flags"], row, {"flags": row["flags"]} | headline.predict_row(committed["model"], row["flags"])


def mgm_2b_rows() -> Comparison:
    committed = read_result(MGM_2B)
    for name, predict_row in mgm_2b.PREDICTED.items():
        for row in committed[name]:
            yield row["flags"], row, {"flags": row["flags"]} | predict_row(row["flags"])


FILES = {"cpu": cpu_rows, "families": families_rows, "gpu": gpu_rows, "headline": headline_rows, "mgm_2b": mgm_2b_rows}


if __name__ == "__main__":
    run_script(main, CompareConfig, exit_code=lambda result: 1 if result["different"] else 0)
