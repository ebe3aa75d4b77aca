"""The benchmark of answering, on a CPU with the tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks import answering
from benchmarks.answering import AnsweringConfig, main
from utils import UserError


ROOT = Path(__file__).parent.parent


def config(tmp_path: Path, *batch_sizes: int) -> AnsweringConfig:
    model, output = str(ROOT / "data/tiny_mgm"), str(tmp_path / "new/answering.json")
    return AnsweringConfig(model=model, num_tokens=300, batch_sizes=list(batch_sizes), output=output)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each batch size, with its seconds; a second start measures what is missing alone."""
    assert main(config(tmp_path, 1))["rows"] == 1
    first = json.loads((tmp_path / "new/answering.json").read_text())
    assert main(config(tmp_path, 2, 1))["rows"] == 2
    rows = json.loads((tmp_path / "new/answering.json").read_text())["rows"]
    assert rows[0] == first["rows"][0] and [row["flags"]["batch_size"] for row in rows] == [1, 2]
    for row in rows:
        assert row["answer_seconds"] > 0 and row["peak_allocated_bytes"] is None
    monkeypatch.setattr(answering, "build_accelerator", lambda *_: pytest.fail("nothing is missing"))
    assert main(config(tmp_path, 1, 2))["rows"] == 2


def test_an_answer_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be timed as if it had all its tokens."""
    monkeypatch.setattr(answering, "generate_tokens", lambda model, prompts, num_tokens: prompts["input_ids"][:, :1])
    with pytest.raises(UserError, match="an answer ended after 1 tokens"):
        main(config(tmp_path, 1))


def test_wrong_flags() -> None:
    for flags, words in (({"num_tokens": 0}, "--num_tokens 0"), ({"batch_sizes": [8, 0]}, "--batch_sizes 0")):
        with pytest.raises(UserError, match=words):
            AnsweringConfig(**flags)
