"""docs/tour.md as a reader types it, in a copy of the repository, without a GPU: each command runs and prints that."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/tour.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# Not of the repository, or what a newcomer's copy has not.
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "outputs", "results", "tests", "demo", "mgm-*", "MGM-*")
PROMISED_SECONDS = 300


@dataclass(frozen=True)
class Stop:
    """One code block of the page, and the lines under it."""

    language: str
    code: str
    shown: list[str]

    @property
    def tolerance(self) -> float:
        """What the page's numbers may be off by, as a share: scores of a trained model hang on its processor's
        rounding."""
        return 0.15 if "--compare" in self.code else 0.0


def stops() -> list[Stop]:
    blocks = BLOCK.findall(PAGE)
    texts = [text.splitlines() if kind == "text" else [] for kind, text in blocks[1:]]
    return [
        Stop(kind, code, shown)
        for (kind, code), shown in zip_longest(blocks, texts, fillvalue=[])
        if kind in ("bash", "python")
    ]


def is_like(shown: str, printed: str, tolerance: float) -> bool:
    """Whether two lines have the same words, and numbers within the tolerance."""
    if NUMBER.split(shown) != NUMBER.split(printed):
        return False
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (shown, printed)]
    return numbers[1] == pytest.approx(numbers[0], rel=tolerance, abs=0)


def missing_line(shown: list[str], printed: list[str], tolerance: float = 0.0) -> str | None:
    """The first line of the page that was not printed in its place. `...` stands for any number of lines."""
    position, may_skip = 0, False
    for line in shown:
        if line == "...":
            may_skip = True
            continue
        last = len(printed) if may_skip else position + 1
        found = (i for i in range(position, min(last, len(printed))) if is_like(line, printed[i], tolerance))
        if (index := next(found, None)) is None:
            return line
        position, may_skip = index + 1, False
    return None if may_skip or position == len(printed) else f"(the end, before: {printed[position]})"


@pytest.mark.parametrize(
    ("shown", "tolerance", "missing"),
    [
        (["a 1", "...", "d 1,000.5 s", "..."], 0.0, None),
        (["a 1", "d 1,000.5 s"], 0.0, "d 1,000.5 s"),
        (["...", "d 1,000.6 s", "..."], 0.0, "d 1,000.6 s"),
        (["...", "d 1,100 s", "..."], 0.15, None),
        (["...", "d 1,200 s", "..."], 0.15, "d 1,200 s"),
        (["...", "d 1,000.5 s"], 0.0, "(the end, before: e)"),
        (["...", "c", "b", "..."], 0.0, "b"),
    ],
)
def test_the_comparison_of_lines(shown, tolerance, missing):
    assert missing_line(shown, ["a 1", "b", "c", "d 1,000.5 s", "e"], tolerance) == missing


def test_the_page_has_every_stop():
    code = "".join(stop.code for stop in stops())
    parts = ["memory_probe.py --gpu", "--plan", "train.py", "tensorboard", "--compare", "conversion.merge", "<image>"]
    assert all(part in code for part in parts)
    assert all(stop.shown for stop in stops() if not stop.code.startswith("tensorboard"))


def repository_files() -> set[Path]:
    folders = (path for path in ROOT.iterdir() if not path.name.startswith("."))
    files = (file for path in folders for file in ([path] if path.is_file() else path.rglob("*")))
    return {file for file in files if "__pycache__" not in file.parts}


def check_tensorboard(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Start it at a free port, and see both runs in it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*command.split(), "--port", str(port)], cwd=folder, env=environment, stderr=subprocess.DEVNULL
    )
    wanted = {"lora/tensorboard", "full/tensorboard"}
    runs: dict[str, dict] = {}
    try:
        deadline = time.monotonic() + 60
        while not wanted <= runs.keys() and time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                with urlopen(f"http://localhost:{port}/data/plugin/scalars/tags") as page:
                    runs = json.load(page)
            except URLError:
                continue  # it is not up yet
    finally:
        server.terminate()
        server.wait(30)
    assert all("train/loss" in runs[name] for name in wanted)


@pytest.mark.slow
def test_the_tour(tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    before = repository_files()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),  # the planner's
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # as `accelerate launch` sets it; where others compute, threads wait for each other
    }
    start = time.monotonic()
    for stop in stops():
        if stop.code.startswith("tensorboard"):
            check_tensorboard(stop.code, copy, environment)
            continue
        command = ["bash", "-ec"] if stop.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, stop.code], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (stop.code, done.stderr[-3000:])
        missing = missing_line(stop.shown, done.stdout.splitlines(), stop.tolerance)
        assert missing is None, (stop.code, missing, done.stdout)
    assert time.monotonic() - start < 2 * PROMISED_SECONDS  # a computer that has other work as well
    assert repository_files() == before
