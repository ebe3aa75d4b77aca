"""Results that grow row by row. A row is written as soon as it is done, and a benchmark that starts again skips it:

    rows = Rows(path, {"version": 1}, config.overwrite)
    for flags in rows.missing(ROWS):
        rows.add({"flags": flags} | measure(flags))

Rows are told apart by their flags. When the code changes so that the same flags give other rows, raise the version.
"""

import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memory.cards import nearest_gpu
from utils import GIB, UserError, environment, flag, write_json


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


@dataclass(kw_only=True)
class RowsConfig:
    overwrite: bool = flag(False, "begin anew; default: add the rows that are missing")


class Rows:
    """A JSON file with one or more lists of rows.

    `settings` hold for all rows: a file with others is begun anew. `about` is noted when a file is begun. A file that
    names no version has version 1.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False, **about: Any) -> None:
        self.path = path
        self.result: dict[str, Any] = settings | about
        if path.exists() and not overwrite:
            found = json.loads(path.read_text())
            if settings.items() <= ({"version": 1} | found).items():
                self.result = found

    def missing(self, wanted: Iterable[dict[str, Any]], name: str = "rows") -> list[dict[str, Any]]:
        """The flags in `wanted` of which there is no row yet."""
        done = [row["flags"] for row in self.result.setdefault(name, [])]
        return [flags for flags in wanted if flags not in done]

    def add(self, row: dict[str, Any], name: str = "rows") -> None:
        self.result[name].append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        write_json(self.path, self.result)


def or_failure(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a row's function returns. A row that fails holds its error, so that the rows after it are still measured.

    Raises:
        UserError: of the machine, not of the row, such as a GPU that something else uses.
    """
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def run_quietly(command: list[str], name: str, folder: Path | None = None) -> None:
    """Run a command in the folder, without what it prints. Raises UserError, with this name of it, if it fails."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{name} ended with exit code {done.returncode}: its own message is above")


def read_result(name: str | Path) -> dict[str, Any]:
    """A file's content. `name` is below results/."""
    return json.loads((RESULTS / name).read_text())


def commit() -> str | None:
    """The commit that is checked out, followed by "-dirty" if the code differs from it; None where git cannot tell.

    The variable GIT_COMMIT names it for a copy that has no history.
    """
    try:
        found = _git("rev-parse", "HEAD")
        # A benchmark that writes its results and their tables does not change the code of the next one.
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!docs")
    except FileNotFoundError:  # no git
        found = changes = ""
    return found + "-dirty" * bool(changes) if found else os.environ.get("GIT_COMMIT")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine(*packages: str) -> dict[str, Any]:
    """The cores, the GPU, Python, the packages' versions and the commit: what figures hold for."""
    versions = environment(*packages)
    device = versions.pop("device")
    gpu = device if torch.cuda.is_available() else "no GPU"
    python = versions.pop("python")
    return {"machine": f"{os.cpu_count()} cores, {gpu}", "python": python, "versions": versions, "commit": commit()}


def gpu_machine() -> dict[str, str | None]:
    """The GPU, PyTorch with the CUDA that it was built for, Python and the commit."""
    versions = environment()
    return {
        "gpu": versions["device"],
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": versions["python"],
        "commit": commit(),
    }


def gpu_of(result: dict[str, Any]) -> str:
    """The entry of memory/cards.py for the card that a result names. These benchmarks need 80 GB: Hopper or newer."""
    return nearest_gpu(result["machine"]["gpu"], capability=(9, 0), total_bytes=80 * GIB)
