"""--sweep: the grid from its words, rows that are kept, and the processes of each launch config."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memory.config import ProbeConfig
from memory.probe import probe
from memory.sweep import parse_grid, row_name, run_sweep
from utils import UserError


def tiny_config(**flags: object) -> ProbeConfig:
    return ProbeConfig(**({"model": "tiny", "max_seq_len": 48, "lora_r": 4, "mode": "predict"} | flags))


@pytest.mark.slow
def test_a_sweep_takes_each_launch_configs_processes(tmp_path):
    """What --config_file says in one row is not given to the next, and a number that was given holds for all."""
    paths = []
    for num_processes in (2, 4):
        paths.append(str(tmp_path / f"{num_processes}.yaml"))
        Path(paths[-1]).write_text(f"distributed_type: MULTI_GPU\nnum_processes: {num_processes}\n")
    for given, expected in (({}, [2, 4]), ({"world_size": 1}, [1, 1])):
        config = tiny_config(sweep=[f"config_file={','.join(paths)}"], output=str(tmp_path / "out"), **given)
        assert [row["config"]["world_size"] for row in run_sweep(config)["rows"]] == expected


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    """Four rows, a file each; started again, none is probed again; a table, a chart and TensorBoard's hparams."""
    probed = []

    def counted(config: ProbeConfig) -> dict:
        probed.append(config)
        return probe(config)

    monkeypatch.setattr("memory.sweep.probe", counted)
    words = ["lora_r=2,4", "gradient_checkpointing=true,false"]
    config = tiny_config(sweep=words, output=str(tmp_path))
    rows = run_sweep(config)["rows"]
    assert [(row["config"]["lora_r"], row["config"]["gradient_checkpointing"]) for row in rows] == [
        (2, True),
        (2, False),
        (4, True),
        (4, False),
    ]
    assert run_sweep(config)["rows"] == rows and len(probed) == 4
    (tmp_path / "rows/lora_r=2_gradient_checkpointing=True.json").unlink()
    run_sweep(config)
    assert len(probed) == 5
    run_sweep(tiny_config(sweep=words, output=str(tmp_path), max_seq_len=64))
    assert len(probed) == 9, "rows of another length are no rows of this one"
    assert (tmp_path / "table.md").read_text().count("| yes |") == 4
    assert (tmp_path / "chart.png").stat().st_size > 5000
    events = EventAccumulator(str(tmp_path / "tensorboard/lora_r=2_gradient_checkpointing=True"))
    events.Reload()
    assert any("hparams" in tag for tag in events.summary_metadata)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["lora_r=4", "strategy=single,zeroX"], "--sweep strategy: --strategy zeroX: choose one of"),
        (["strategy=single,ddp", "world_size=2"], "--sweep strategy: --world_size 2: single is one process"),
        (["lora_r=4,-1"], "--sweep lora_r: --lora_r -1"),
    ],
)
def test_a_value_that_no_row_can_have(tmp_path, monkeypatch, words, error):
    """It is a mistake, and no row is probed."""
    monkeypatch.setattr("memory.sweep.probe", lambda config: pytest.fail("a row was probed"))
    with pytest.raises(UserError, match=error):
        run_sweep(tiny_config(sweep=words, output=str(tmp_path)))


def test_a_row_that_cannot_be_probed(tmp_path, capsys):
    """The others are; below the table stands why it is not. Where none can be, the first reason ends it."""
    config = tiny_config(sweep=["images_per_sample=4,1"], output=str(tmp_path))
    found = run_sweep(config)
    assert [row["config"]["images_per_sample"] for row in found["rows"]] == [1]
    assert [row["flags"] for row in found["failed"]] == [{"images_per_sample": 4}]
    assert "Not probed: --images_per_sample 4: " in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="4 images take 64 positions"):
        run_sweep(tiny_config(sweep=["images_per_sample=4"], output=str(tmp_path)))


@pytest.mark.parametrize(
    "word", ["lora_r", "lora_r=", "rank=8", "lora_r=eight", "gradient_checkpointing=maybe", "sweep=1"]
)
def test_words_of_a_sweep_that_mean_nothing(word):
    with pytest.raises(UserError, match=f"--sweep {word}"):
        parse_grid([word])


def test_values_have_their_flags_types():
    """Numbers, truth values, lists and names."""
    words = ["lora_r=0,8", "budget_gib=7.5", "lora_target_modules=q_proj+v_proj,o_proj"]
    grid = parse_grid(words)
    assert grid["lora_r"] == [0, 8] and grid["budget_gib"] == [7.5]
    assert grid["lora_target_modules"] == [["q_proj", "v_proj"], ["o_proj"]]
    assert row_name({"lora_target_modules": ["q_proj", "v_proj"], "strategy": "zero3"}) == (
        "lora_target_modules=q_proj+v_proj_strategy=zero3"
    )
