"""Every row of results/ that has predicted and measured memory, for benchmarks/charts.py and docs/report.md."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import read_result


FULL_LOSS, ZERO3 = "with logits", "ZeRO-3"
GPU_FILES = {  # the whole device
    "MGM-2B, H200": "gpu/matrix.json",
    "plans for 6 to 24 GiB, H200": "gpu/plans.json",
    "other families, H100": "gpu/families.json",
    "strategies on two GPUs, H200": "gpu/scaling.json",
}
CPU_FILES = {"MGM, CPU": "cpu/matrix.json", "other families, CPU": "families.json"}  # the tensors


@dataclass(frozen=True)
class Pair:
    kind: str  # what was measured, and on what
    flags: dict[str, Any]
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def difficulty(self) -> str:
        """Of the two kinds of steps for which the prediction is least sure, this row's: FULL_LOSS, ZERO3 or ""."""
        if self.flags.get("loss") == "full":
            return FULL_LOSS
        is_zero3 = "zero3" in (self.flags.get("config_file") or "") or self.flags.get("strategy") == "zero3"
        return ZERO3 if is_zero3 else ""


def gpu_pairs() -> Iterator[Pair]:
    for kind, name in GPU_FILES.items():
        result = read_result(name)
        for row in result["rows"] if "rows" in result else result["plans"]:
            # A row that ran out of memory, as predicted, has no size.
            if "predicted" in row and "measured" in row and not row["measured"].get("oom"):
                sizes = (row[which]["device_bytes"] for which in ("predicted", "measured"))
                yield Pair(kind, row["flags"] | row.get("chosen", {}), *sizes)


def cpu_pairs() -> Iterator[Pair]:
    for kind, name in CPU_FILES.items():
        for row in read_result(name)["rows"]:
            yield Pair(kind, row["flags"], row["predicted_bytes"], row["measured_bytes"])
