"""The benchmark of answering: measured on a CPU with the tiny model, and the predictions for MGM-2B."""

import json
from pathlib import Path

import pytest

from benchmarks import answering
from benchmarks.answering import AnsweringConfig, main, predict_row
from benchmarks.rows import read_result
from memory.launch import in_fresh_process
from utils import UserError


ROOT = Path(__file__).parent.parent
RESULT = read_result("answering.json")


def config(tmp_path: Path, *batch_sizes: int) -> AnsweringConfig:
    model, output = str(ROOT / "data/tiny_mgm"), str(tmp_path / "new/answering.json")
    return AnsweringConfig(mode="measure", model=model, num_tokens=300, batch_sizes=list(batch_sizes), output=output)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each batch size, with its seconds; a second start measures what is missing alone."""
    assert main(config(tmp_path, 1))["measured"] == 1
    first = json.loads((tmp_path / "new/answering.json").read_text())
    assert main(config(tmp_path, 2, 1))["measured"] == 2
    rows = json.loads((tmp_path / "new/answering.json").read_text())["rows"]
    assert rows[0] == first["rows"][0] and [row["flags"]["batch_size"] for row in rows] == [1, 2]
    for row in rows:
        assert row["answer_seconds"] > 0 and row["peak_allocated_bytes"] is None
    monkeypatch.setattr(answering, "build_accelerator", lambda *_: pytest.fail("nothing is missing"))
    assert main(config(tmp_path, 1, 2))["measured"] == 2


def test_an_answer_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be timed as if it had all its tokens."""
    monkeypatch.setattr(answering, "generate_tokens", lambda model, prompts, num_tokens: prompts["input_ids"][:, :1])
    with pytest.raises(UserError, match="an answer ended after 1 tokens"):
        main(config(tmp_path, 1))


@pytest.mark.slow
@pytest.mark.parametrize("row", RESULT["predicted"], ids=lambda row: str(row["flags"]))
def test_predicted(row: dict) -> None:
    """As the file has it, and as it must be: a faster card and a larger batch take less time for a question."""
    predicted = AnsweringConfig(model=RESULT["model"], num_tokens=RESULT["num_tokens"])
    again = in_fresh_process(predict_row, predicted, row["flags"]["gpu"], row["flags"]["batch_size"])
    assert again == pytest.approx({name: row[name] for name in ("answer_seconds", "token_seconds")})
    for other in RESULT["predicted"]:
        if other["flags"] == row["flags"] | {"batch_size": 8}:
            assert other["answer_seconds"] / 8 <= row["answer_seconds"] / row["flags"]["batch_size"]
        if other["flags"] == row["flags"] | {"gpu": "h200"}:
            assert other["answer_seconds"] <= row["answer_seconds"]


def test_wrong_flags() -> None:
    wrong = {"mode": "guess"}, {"num_tokens": 0}, {"batch_sizes": [8, 0]}
    for flags, words in zip(wrong, ("--mode guess", "--num_tokens 0", "--batch_sizes 0"), strict=True):
        with pytest.raises(UserError, match=words):
            AnsweringConfig(**flags)
