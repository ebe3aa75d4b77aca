"""Results that grow row by row: what counts as done, when a file is begun anew, and what an interruption leaves."""

import json
from pathlib import Path

import pytest

from benchmarks.rows import Rows
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
