"""Results that grow row by row: what counts as done, when a file is begun anew, and what an interruption leaves."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import rows as rows_module
from benchmarks.rows import Rows, commit
from utils import write_json


WANTED = [{"lora_r": rank} for rank in (8, 16, 32)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that names no version, with a note on its machine and two of the three rows."""
    path = tmp_path / "new/rows.json"
    write_json(path, {"machine": "a", "rows": [{"flags": flags, "bytes": 1} for flags in WANTED[:2]]})
    return path


def test_rows_that_are_done_are_skipped(path):
    """An interrupted run goes on, and what the file holds beside its rows stays."""
    rows = Rows(path, {"version": 1}, machine="b")
    assert rows.missing(WANTED) == WANTED[2:]
    rows.add({"flags": WANTED[2], "bytes": 2})
    assert json.loads(path.read_text()) == rows.result
    assert rows.result["machine"] == "a" and [row["bytes"] for row in rows.result["rows"]] == [1, 1, 2]
    assert Rows(path, {"version": 1}).missing(WANTED) == []
    assert Rows(path, {"version": 1}).missing(WANTED, "others") == WANTED


@pytest.mark.parametrize(
    ("settings", "overwrite"), [({"version": 2}, False), ({"version": 1, "model": "tiny"}, False), ({}, True)], ids=str
)
def test_a_file_is_begun_anew(path, settings, overwrite):
    """When the version was raised, for another model, and with --overwrite; not before the first row is done."""
    before = path.read_text()
    rows = Rows(path, settings, overwrite, machine="b")
    assert rows.missing(WANTED) == WANTED and path.read_text() == before
    rows.add({"flags": WANTED[0]})
    assert json.loads(path.read_text()) == settings | {"machine": "b", "rows": [{"flags": WANTED[0]}]}


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_text()

    def fails(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        Rows(path, {"version": 1}).write()
    assert path.read_text() == before


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git's, with a mark if a file differs from it; without git's history, that of the variable."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(rows_module, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert commit() == "abc"
    monkeypatch.setenv("PATH", "")
    assert commit() == "abc", "git is not installed"
    monkeypatch.undo()
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(rows_module, "ROOT", tmp_path)
    (tmp_path / "file").write_text("a")
    git("init")
    git("add", "file")
    git("commit", "-m", "Add a file")
    assert commit() == git("rev-parse", "HEAD") and len(commit()) == 40
    (tmp_path / "results").mkdir()
    for path in ("results/row", "file"):
        (tmp_path / path).write_text("b")
        git("add", path)
        assert commit() == git("rev-parse", "HEAD") + ("-dirty" if path == "file" else "")
