"""CONTRIBUTING.md: what it names exists, and its examples work in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK = re.compile(r"^```(diff|bash)\n(.*?)^```", re.M | re.S)
SECTION = re.compile(r"^## Add a (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)


def test_what_is_named_exists():
    text = BLOCK.sub("", PAGE)
    paths = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"(?<=[` ])\w+/[\w/]+\.(?:py|json)\b", text)
    paths += [f"benchmarks/{name}.py" for name in re.findall(r"-m benchmarks\.(\w+)", text)]
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_addition_has_an_example():
    examples = {title: [kind for kind, _ in BLOCK.findall(text)] for title, text in SECTION.findall(PAGE)}
    assert examples.keys() == {"model family", "card", "strategy", "task"}
    assert all({"diff", "bash"} == set(kinds) and kinds[-1] == "bash" for kinds in examples.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the changes")
@pytest.mark.parametrize(("title", "text"), SECTION.findall(PAGE), ids=[title for title, _ in SECTION.findall(PAGE)])
def test_the_example_works(title, text, tmp_path):
    """Its changes apply to the code as it is now, and the tests that it names pass with them."""
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs", "mgm-*", "MGM-*"))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, code in BLOCK.findall(text):
        command = ["git", "apply", "-"] if kind == "diff" else ["bash", "-e"]
        done = subprocess.run(
            command, input=code, cwd=copy, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (code, done.stdout[-3000:], done.stderr[-3000:])
        assert kind == "diff" or "pytest" not in code or re.search(r"\d+ passed", done.stdout)
