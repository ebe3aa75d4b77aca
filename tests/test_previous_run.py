"""--overwrite_output_dir: the old run is whole until the new one has trained, and then it is gone."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from forked_runs import Fault, run

from training import previous_run
from training.previous_run import PreviousRun


FLAGS = "--max_steps 3 --save_steps 2 --eval_samples 0 --dataloader_num_workers 0 --no_rehearse --logging_steps 1"
FLAGS += " --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --dataset data/demo/validation.json"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with a file of the user's. To be copied."""
    folder = tmp_path_factory.mktemp("old")
    ended = run(f"{FLAGS} --lora_r 16 --output_dir {folder / 'out'}", folder)
    assert ended.code == 0, ended.err[-2000:]
    (folder / "out/notes.txt").write_text("mine")
    (folder / "out/scores.json").write_text("{}")
    return folder / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def has_old_adapter(folder: Path) -> bool:
    """Whether something would load it."""
    return (folder / "adapter_config.json").exists() and (folder / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("train.training_step", 1, "terminate"), 143),
        (Fault("train.training_step", 1, "disk full"), 2),
        (Fault("mgm.modeling_mgm.MGMForConditionalGeneration.forward", 1, "nan", times=99), 2),
    ],
    ids=["terminated", "failed", "never trained"],
)
def test_a_run_that_does_not_train_leaves_the_old_one(fault: Fault, code: int, old: Path, tmp_path: Path) -> None:
    """Every file as it was."""
    shutil.copytree(old, tmp_path / "out")
    flags = f"{FLAGS} --lora_r 4 --max_nonfinite_updates 2 --overwrite_output_dir --output_dir {tmp_path / 'out'}"
    assert run(flags, tmp_path, faults=(fault,)).code == code
    assert content(tmp_path / "out") == content(old)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["terminate", "kill"])
def test_a_run_that_is_stopped_leaves_no_old_adapter(action: str, old: Path, tmp_path: Path) -> None:
    """Within the second update: the old adapter, card and checkpoints are gone; what the user had there is kept."""
    shutil.copytree(old, tmp_path / "out")
    flags = f"{FLAGS} --lora_r 4 --overwrite_output_dir --output_dir {tmp_path / 'out'}"
    ended = run(flags, tmp_path, faults=(Fault("train.training_step", 3, action),))
    assert ended.code == (143 if action == "terminate" else -signal.SIGKILL), ended.err[-2000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {"checkpoint-1"} == {"tensorboard", "notes.txt", "scores.json"}
    assert not set(content(old / "tensorboard")) & set(content(tmp_path / "out/tensorboard"))
    if action == "terminate":
        flags = flags.replace("--overwrite_output_dir", "--resume_from_checkpoint latest")
        assert run(flags, tmp_path).code == 0
        assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4


def test_killed_while_it_removes(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each single file: the old adapter with its card and run.json, or nothing that would be loaded."""

    class Killed(Exception):
        pass

    removed, original = 0, previous_run.os.unlink

    def unlink(path: Path, **options: int) -> None:
        nonlocal removed
        if removed == allowed:
            raise Killed
        removed += 1
        original(path, **options)

    allowed, num_kills = 0, 0
    while True:
        folder = tmp_path / str(allowed)
        shutil.copytree(old, folder)
        removed = 0
        monkeypatch.setattr(previous_run.os, "unlink", unlink)
        try:
            PreviousRun(folder).remove()
            break
        except Killed:
            num_kills += 1
        finally:
            monkeypatch.undo()
        is_whole = (folder / "run.json").exists() and (folder / "README.md").exists()
        assert is_whole or not has_old_adapter(folder), f"killed before file {allowed}"
        allowed += 1
    assert num_kills > 8 and not has_old_adapter(folder)


def test_a_folder_that_is_no_runs(tmp_path: Path) -> None:
    """A README that is not a card stays."""
    (tmp_path / "README.md").write_text("My project")
    PreviousRun(tmp_path).remove()
    assert (tmp_path / "README.md").exists()
