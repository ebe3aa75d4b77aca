"""train.py --doctor on several machines: what it says of reports, and of a process that does not come."""

from dataclasses import replace
from pathlib import Path

import pytest

from memory.launch import free_port
from training import doctor_machines
from training.config import TrainConfig
from training.doctor import warning
from training.doctor_machines import (
    Report,
    as_table,
    join,
    judge_machines,
    look_at_process,
    run_doctor_on_machines,
)
from utils import UserError


MAIN = Report(0, "one", "10.0.0.1", {"GLOO_SOCKET_IFNAME": "eth0"}, {"torch": "2.13.0"}, "c0de", "40 records, ab")
OTHER = replace(MAIN, rank=1, machine="two", address="10.0.0.2")


def test_a_machine_without_model_and_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says why neither can be read."""
    for name, value in {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    missing = {name: str(tmp_path / name) for name in ("model", "dataset")}
    report = look_at_process(TrainConfig(**missing), rank=1)
    assert report.data == "cannot be read"
    for finding, path in zip(report.findings, missing.values(), strict=True):
        assert finding.mark == "problem" and path in finding.what


def test_machines_that_are_alike() -> None:
    """A row for each machine, whatever its number of processes."""
    reports = [MAIN, replace(MAIN, rank=1), replace(OTHER, rank=2), replace(OTHER, rank=3)]
    [finding] = judge_machines(reports, [])
    assert finding.mark == "ok" and "4 processes are alike" in finding.what
    assert [row.split(" | ")[:2] for row in as_table(reports).splitlines()[2:]] == [
        ["| one", "0, 1"],
        ["| two", "2, 3"],
    ]


@pytest.mark.parametrize(
    ("changes", "mark", "words"),
    [
        ({"versions": {"torch": "2.12.0"}}, "problem", "other versions: torch 2.12.0 (rank 0 on one: 2.13.0)"),
        ({"versions": {}}, "problem", "torch None"),
        ({"code": "0ld"}, "problem", "rank 1 on two has other code than rank 0 on one"),
        ({"data": "no such file"}, "problem", "other data than rank 0 on one: no such file; there 40 records"),
        ({"clock_seconds": -3.0}, "warning", "differs from rank 0 on one's by -3.0 s"),
        ({"collective": "refused"}, "problem", "a sum over all processes fails: rank 1 on two: refused"),
        ({"findings": [warning("little memory", "close programs")]}, "warning", "two: little memory"),
    ],
)
def test_each_difference_has_its_remedy(changes: dict, mark: str, words: str) -> None:
    """Read back as it is sent."""
    other = Report.from_json(replace(OTHER, **changes).to_json())
    [finding] = [each for each in judge_machines([MAIN, other], []) if each.mark != "ok"]
    assert finding.mark == mark and words in finding.what and finding.remedy


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """It is named after the time-out."""
    launch(monkeypatch, rank=0)
    result = run_doctor_on_machines(TrainConfig(model="data/tiny_mgm"))
    assert result["status"] == "problem" and "rank 1 is missing" in result["findings"][0]["what"]
    assert "| 0 | 127.0.0.1 |" in capsys.readouterr().out


def test_no_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, rank=1)
    with pytest.raises(UserError, match="rank 1 on .*: the main process cannot be reached at 127.0.0.1, port"):
        join(1)


def launch(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """What a launcher sets, for the one process of two that is there."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(doctor_machines, "JOIN_SECONDS", 1)
