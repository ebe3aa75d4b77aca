"""Nothing from outside is executed or unpickled, nothing written outside --output_dir; a full disk costs nothing."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from forked_runs import Fault, run

from data.dataset import open_dataset
from data.lengths import measure_lengths
from models.loading import load_model, load_processor
from utils import UserError


ROOT = Path(__file__).parent.parent
FLAGS = "--max_steps 4 --save_steps 1 --save_total_limit 0 --eval_samples 0 --dataloader_num_workers 0 --no_rehearse"
FLAGS += " --per_device_train_batch_size 2 --learning_rate 4e-3 --dataset data/demo/validation.json"
RESUME = " --resume_from_checkpoint latest"


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if path.name.startswith(("checkpoint", ".tmp")))


@pytest.mark.slow
def test_disk_full_injected(tmp_path: Path) -> None:
    """The third checkpoint finds no room: one line, the ones before intact, and the run can go on from there."""
    flags = f"{FLAGS} --output_dir {tmp_path / 'out'}"
    fault = Fault("training.checkpoint_files.write_durably", 8, "disk full")  # three files each: the third state.json
    ended = run(flags, tmp_path, faults=(fault,))
    assert ended.code == 2 and "checkpoint of step 3 cannot be written" in ended.error
    assert "No space left on device" in ended.error and "the one of step 2 is intact" in ended.error
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
    assert run(flags + RESUME, tmp_path).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 4 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_disk_full_for_real(small_disk: Path, tmp_path: Path) -> None:
    """The same on a disk of 4 MiB, where the fourth checkpoint of 1.2 MB does not fit."""
    output_dir = small_disk / "out"
    ended = run(f"{FLAGS} --output_dir {output_dir}", tmp_path)
    assert ended.code == 2 and "No space left on device" in ended.error
    assert f"warning: {output_dir} has" in ended.err and "and the run may need" in ended.err
    kept = checkpoints(output_dir)
    assert len(kept) >= 2 and not any(name.startswith(".tmp") for name in kept)
    assert f"the one of step {len(kept)} is intact" in ended.error
    shutil.rmtree(output_dir / "checkpoint-1")
    flags = FLAGS.replace("limit 0", "limit 1")
    ended = run(f"{flags} --output_dir {output_dir}{RESUME}", tmp_path)
    assert "Resumed from" in ended.out and f"checkpoint-{len(kept)}" in ended.out


@pytest.mark.slow
def test_disk_full_at_the_end(small_disk: Path, tmp_path: Path) -> None:
    """The curves fit, the adapter does not: one line."""
    (small_disk / "others").write_bytes(bytes(2**22 - 250_000))
    flags = FLAGS.replace("save_steps 1", "save_steps 0")
    ended = run(f"{flags} --output_dir {small_disk / 'out'}", tmp_path)
    assert ended.code == 2 and "No space left on device" in ended.error, ended.err[-2000:]


def test_disk_full_of_the_datasets_cache(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of 8 MB does not fit on 4 MiB, and the cache is named."""
    text = "word " * 20_000
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": text}]
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"conversations": turns})] * 80))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", small_disk)
    with pytest.raises(UserError, match=f"cache {small_disk} cannot be written .No space left.*HF_DATASETS_CACHE"):
        open_dataset(tmp_path / "data.jsonl")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("stage", ["read", "measured"])
def test_cache_that_cannot_be_written(stage: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected, while records are read and while their tokens are counted: one line, exit code 2."""
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}]))
    dataset = open_dataset(tmp_path / "data.json") if stage == "measured" else None

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", fail)
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", fail)
    with pytest.raises(UserError, match="the datasets cache .* cannot be written"):
        if dataset is None:
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
            open_dataset(tmp_path / "data.json")
        else:
            measure_lengths(dataset.records, load_processor("data/tiny_mgm"), 77)


@pytest.mark.slow
def test_read_only_output(tmp_path: Path) -> None:
    """A folder in which nothing can be made: one line before training, exit code 2."""
    ended = run(f"{FLAGS} --output_dir /proc/no_such/out", tmp_path)
    assert ended.code == 2 and "--output_dir /proc/no_such/out" in ended.error
    (tmp_path / "file").touch()
    ended = run(f"{FLAGS} --output_dir {tmp_path / 'file'}", tmp_path)
    assert ended.code == 2 and "this is a file" in ended.error


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_as_weights_is_not_executed(tmp_path: Path) -> None:
    """torch.load has weights_only; a model folder with such a file is refused in one line."""
    folder, hit = tmp_path / "model", tmp_path / "hit"
    shutil.copytree(ROOT / "data/tiny_mgm", folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(hit)}))
    with pytest.raises(UserError):
        load_model(str(folder), torch.float32, "sdpa")
    assert not hit.exists()


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    """auto_map names a class in a file of the folder: without trust_remote_code it is not imported."""
    folder, hit = tmp_path / "model", tmp_path / "hit"
    shutil.copytree(ROOT / "data/tiny_mgm", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(hit)!r})\nclass Config: pass\n")
    with pytest.raises(UserError):
        load_model(str(folder), torch.float32, "sdpa")
    with pytest.raises(UserError):
        load_processor(str(folder / "missing"))
    assert not hit.exists()


def test_code_beside_a_data_set_is_not_run(tmp_path: Path) -> None:
    """A folder with a loading script is a folder without data; a pickle beside the records is just a file."""
    hit = tmp_path / "hit"
    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text(f"import os\nos.mkdir({str(hit)!r})\n")
    (tmp_path / "set/data.pkl").write_bytes(pickle.dumps(Bomb(hit)))
    with pytest.raises(UserError):
        open_dataset(tmp_path / "set")
    (tmp_path / "a.png").write_bytes(pickle.dumps(Bomb(hit)))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    with pytest.raises(UserError):
        open_dataset(tmp_path / "data.json")[0]
    assert not hit.exists()


def test_nothing_unpickles_or_trusts() -> None:
    """In the sources: no pickle.load, no torch.load without weights_only, no trust_remote_code, no eval or exec."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "conversion").glob("*.py")]:
        text = path.read_text()
        for found in re.finditer(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in found[0], f"{path.name}: {found[0]}"
        assert not re.search(r"pickle\.loads?\(|trust_remote_code|(?<![\w.])(eval|exec)\(", text), path.name


@pytest.mark.slow
def test_no_network_and_nothing_outside(tmp_path: Path) -> None:
    """A run opens no connection, and writes nothing beside --output_dir and the caches."""
    before = set(ROOT.rglob("*"))
    faults = tuple(Fault(f"socket.{name}", 1, "disk full", times=99) for name in ("create_connection", "getaddrinfo"))
    ended = run(f"{FLAGS} --output_dir {tmp_path / 'out'}", tmp_path, faults=faults)
    assert ended.code == 0, ended.err[-2000:]
    new = {path for path in set(ROOT.rglob("*")) - before if "__pycache__" not in path.parts}
    assert not new and {path.name for path in tmp_path.iterdir()} == {"out", "0.out", "0.err"}
