"""Runs that are killed, damaged or resumed wrongly: what is resumed ends bitwise where an undisturbed run ends."""

import json
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from forked_runs import ROOT, Ended, Fault, Run, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.demo import ensure_demo
from training.checkpoints import check_settings, run_settings
from training.config import TrainConfig
from utils import UserError, flags_free_on_resume


NUM_STEPS = 13  # 10 updates an epoch: the second epoch is entered
FLAGS = f"--max_steps {NUM_STEPS} --save_steps 3 --logging_steps 2 --eval_samples 0 --dataloader_num_workers 0"
FLAGS += " --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 4e-3"
RESUME = " --resume_from_checkpoint latest"
TWO_PROCESSES = FLAGS.replace("batch_size 2", "batch_size 1")


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty records of the demo, every fourth text only."""
    demo = ensure_demo()
    records = json.loads((demo / "train.json").read_text())[:40]
    for record in records[::4]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(records))
    return f" --dataset {path} --image_folder {demo}"


@pytest.fixture(scope="module")
def references(data_flags: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("single", "zero3")}
    for name, folder in folders.items():
        ended = run(f"{FLAGS}{data_flags} --output_dir {folder / 'out'}", folder, name)
        assert ended.code == 0, ended.err[-3000:]
    return {name: folder / "out" for name, folder in folders.items()}


def loss_curve(output_dir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(output_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def assert_same_run(output_dir: Path, reference: Path) -> None:
    """The adapter byte for byte, the totals, and a curve with each point once."""
    for name in ("adapter_model.safetensors", f"checkpoint-{NUM_STEPS}/trained-00001.safetensors"):
        assert (output_dir / name).read_bytes() == (reference / name).read_bytes(), name
    results = [json.loads((folder / "run.json").read_text()) for folder in (output_dir, reference)]
    for key in ("global_step", "train_loss", "last_loss"):
        assert results[0][key] == results[1][key], key
    assert loss_curve(output_dir) == loss_curve(reference)
    assert not list(output_dir.glob(".tmp-*"))


KILLS = [
    Fault("train.training_step", 16, "kill"),  # in the middle of update 8: checkpoint 6 is there
    Fault("training.checkpoint_files.write_durably", 1, "kill"),  # saving 9: no file yet
    Fault("training.checkpoint_files.write_durably", 2, "kill"),  # one file
    Fault("training.checkpoint_files.sync_folder", 1, "kill"),  # all files, not renamed
    Fault("training.checkpoint_files.sync_folder", 2, "kill"),  # renamed: 9 is there
    Fault("training.checkpoints.remove_checkpoints", 1, "kill"),  # saving 12: an old one too many
    Fault("shutil.rmtree", 5, "kill"),  # saving the last: the oldest not yet deleted
    Fault("train.save_trained", 1, "kill"),  # all updates done, the adapter not written
]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single", "zero3"])
def test_killed_at_every_point(config: str, data_flags: str, references: dict[str, Path], tmp_path: Path) -> None:
    """One run, killed eight times in a row and resumed each time: within an update, in every phase of a save."""
    flags = f"{FLAGS}{data_flags} --output_dir {tmp_path / 'out'}"
    kills = KILLS if config == "single" else KILLS[:1] + KILLS[3:5]
    for i, fault in enumerate(kills):
        ended = run(flags + (RESUME if i else ""), tmp_path, config, faults=(fault,))
        assert ended.code == -signal.SIGKILL, (fault, ended.err[-3000:])
    ended = run(flags + RESUME, tmp_path, config)
    assert ended.code == 0, ended.err[-3000:]
    assert_same_run(tmp_path / "out", references[config])


@pytest.mark.slow
def test_killed_at_random_moments(data_flags: str, references: dict[str, Path], tmp_path: Path) -> None:
    """Killed from outside after random times, with workers that open images and a checkpoint at every update."""
    flags = f"{FLAGS}{data_flags} --output_dir {tmp_path / 'out'}"
    flags = flags.replace("workers 0", "workers 2").replace("save_steps 3", "save_steps 1")
    generator, num_kills, output_dir = random.Random(0), 0, tmp_path / "out"
    ended, resume = None, ""
    while ended is None or ended.code != 0:
        started, seen = Run(flags + resume, tmp_path), set(output_dir.glob("checkpoint-*"))
        while num_kills < 4 and started.processes[0].is_alive() and set(output_dir.glob("checkpoint-*")) <= seen:
            time.sleep(0.01)
        if num_kills < 4:
            time.sleep(generator.uniform(0, 0.3))
            started.send(signal.SIGKILL)
            num_kills += 1
        ended, resume = started.wait(), RESUME
        assert ended.code in (0, -signal.SIGKILL), ended.err[-3000:]
    assert num_kills == 4
    assert_same_run(output_dir, references["single"])


@pytest.fixture(scope="module")
def killed(data_flags: str, references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed in update 8, with checkpoints 3 and 6. To be copied."""
    folder = tmp_path_factory.mktemp("killed")
    fault = Fault("train.training_step", 15, "kill")
    assert run(f"{FLAGS}{data_flags} --output_dir {folder / 'out'}", folder, faults=(fault,)).code < 0
    return folder / "out"


def resume(killed: Path, data_flags: str, folder: Path, changes: str = "", checkpoint: str = "latest") -> Ended:
    shutil.copytree(killed, folder / "out")
    flags = f"{FLAGS}{data_flags} --output_dir {folder / 'out'} --resume_from_checkpoint {checkpoint} {changes}"
    return run(flags, folder)


@pytest.mark.slow
def test_damaged_checkpoints(killed: Path, data_flags: str, references: dict[str, Path], tmp_path: Path) -> None:
    """A byte that changed, a file cut off, a missing one: named, left out, and the checkpoint before is used."""
    newest = killed / "checkpoint-6"
    for number, damage in enumerate(("flipped", "truncated", "missing")):
        copy, folder = tmp_path / f"copy-{number}", tmp_path / damage
        shutil.copytree(killed, copy)
        path = copy / newest.name / "trained-00001.safetensors"
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[-1000] ^= 1
            path.write_bytes(content)
        elif damage == "truncated":
            path.write_bytes(content[:-1000])
        else:
            path.unlink()
        ended = resume(copy, data_flags, folder)
        assert ended.code == 0 and f"{newest.name} is left out: trained-00001" in ended.out, ended.err[-2000:]
        assert "Resumed from" in ended.out and "checkpoint-3: 3 updates" in ended.out
    assert_same_run(folder / "out", references["single"])


@pytest.mark.slow
def test_none_that_is_good(killed: Path, data_flags: str, tmp_path: Path) -> None:
    """`latest` without a good checkpoint, and a named one that is damaged: exit code 2."""
    copy = tmp_path / "copy"
    shutil.copytree(killed, copy)
    for path in copy.glob("checkpoint-*/checksums.json"):
        path.write_text("{")
    ended = resume(copy, data_flags, tmp_path / "a")
    assert ended.code == 2 and "no good checkpoint" in ended.error and "--overwrite_output_dir" in ended.error
    ended = resume(copy, data_flags, tmp_path / "b", checkpoint=str(tmp_path / "b/out/checkpoint-6"))
    assert ended.code == 2 and "checksums.json is damaged" in ended.error


@pytest.mark.slow
def test_settings_that_cannot_work(killed: Path, data_flags: str, tmp_path: Path) -> None:
    """The differences are shown, all of them, and nothing is touched."""
    before = sorted((path.relative_to(killed), path.stat().st_size) for path in killed.rglob("*"))
    ended = resume(killed, data_flags, tmp_path, "--lora_r 8 --learning_rate 1e-3 --max_steps 9")
    assert ended.code == 2
    for words in (
        "lora_r was 16, now 8",
        "learning_rate was 0.004, now 0.001",
        "(--max_steps or --num_train_epochs) was 13, now 9",
        "[16, ",
    ):
        assert words in ended.error
    out = tmp_path / "out"
    assert before == sorted((path.relative_to(out), path.stat().st_size) for path in out.rglob("*"))


@pytest.mark.slow
def test_other_data(killed: Path, data_flags: str, tmp_path: Path) -> None:
    """Another data set has no place to go on in."""
    ended = resume(killed, "", tmp_path, "--dataset data/demo/validation.json")
    assert ended.code == 2 and "the data set had 40 records, now " in ended.error


def test_flags_that_may_change() -> None:
    """Each of them says so itself; a new flag has to stay."""
    assert flags_free_on_resume(TrainConfig) == {
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
        *(
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "dataset",
            "image_folder",
            "follow_links",
            "eval_dataset",
        ),
        *("eval_samples", "dataloader_num_workers", "doctor", "per_device_eval_batch_size", "max_new_tokens"),
        *("allow_missing_end_of_turn", "on_bad_sample", "max_bad_fraction", "max_nonfinite_updates", "forecast"),
        *("rehearse", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("gradient_checkpointing", "checkpoint_num_layers", "checkpoint_num_mlps", "mlp_tiles"),
        *("attn_implementation", "mixed_precision", "loss"),
    }
    config = TrainConfig(seed=7, save_steps=3)
    settings = run_settings(config, updates=13)
    assert settings["seed"] == 7 and settings["updates"] == 13 and "save_steps" not in settings

    @dataclass(kw_only=True)
    class WithNewFlag(TrainConfig):
        new: int = field(default=1, metadata={"help": "whatever"})

    assert flags_free_on_resume(WithNewFlag) == flags_free_on_resume(TrainConfig)


def test_checkpoint_of_an_earlier_version() -> None:
    """Such a one has a hash of the samples' lengths for its data, and no other digest of them."""
    now = {"lora_r": 16, "data": {"num_records": 40, "sha256": "f5a84c196513c4f9"}, "lengths": "737ef7ee6be5fea5"}
    with pytest.raises(UserError, match="other settings: an earlier version of train.py made it") as refused:
        check_settings(Path("checkpoint-2"), {"lora_r": 16, "data": "737ef7ee6be5fea5"}, now)
    assert "sha256" not in str(refused.value)


def changed(data_flags: str, path: Path, how: str) -> str:
    """The records with another label, another image or in another order, all as long as before; the flags for them."""
    words = data_flags.split()
    records = json.loads(Path(words[1]).read_text())
    images = [record for record in records if "image" in record]
    if how == "relabelled":
        replies = {len(record["conversations"][1]["value"]): record["conversations"][1] for record in records}
        one, other = next(
            (a, b)
            for a in (record["conversations"][1] for record in records)
            for b in replies.values()
            if len(a["value"]) == len(b["value"]) == 1 and a["value"] != b["value"]
        )
        one["value"] = other["value"]
    elif how == "other image":
        images[0]["image"] = next(record["image"] for record in images if record["image"] != images[0]["image"])
    else:
        records = [*images[::-1], *(record for record in records if "image" not in record)]
    path.write_text(json.dumps(records))
    return f" --dataset {path} {' '.join(words[2:])}"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["relabelled", "other image", "reordered"])
def test_changed_data(how: str, killed: Path, references: dict[str, Path], data_flags: str, tmp_path: Path) -> None:
    """As many records, which cannot be told apart by their lengths; nor does a finished run count as theirs."""
    flags = changed(data_flags, tmp_path / "changed.json", how)
    ended = resume(killed, flags, tmp_path / "killed")
    assert ended.code == 2 and "as before, but their texts, image names or order differ" in ended.error
    ended = resume(references["single"], flags, tmp_path / "finished")
    assert ended.code == 2 and "is finished, and the data set has 40 records as before, but" in ended.error


@pytest.mark.slow
def test_other_questions(tmp_path: Path) -> None:
    """As many held-out questions, but others: the score from before training is not set beside theirs."""
    flags = "--max_steps 2 --save_steps 1 --save_total_limit 0 --per_device_train_batch_size 2 --no_rehearse"
    flags += f" --dataloader_num_workers 0 --eval_samples 4 --forecast false --output_dir {tmp_path / 'out'}"
    flags += " --dataset data/demo/validation.json --eval_dataset data/demo/"
    fault = Fault("train.training_step", 2, "kill")
    assert run(f"{flags}validation.json", tmp_path, faults=(fault,)).code < 0
    ended = run(f"{flags}train.json{RESUME}", tmp_path)
    assert ended.code == 0, ended.err[-2000:]
    assert "exact_match_before" not in ended.result["eval"] and ended.result["eval"]["n"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(8, 0), (0, 8)])
def test_other_eval_samples(before: int, after: int, tmp_path: Path) -> None:
    """Held-out questions switched off or on when a run goes on: it ends with the scores that there are."""
    flags = "--max_steps 2 --save_steps 1 --save_total_limit 0 --per_device_train_batch_size 2 --no_rehearse"
    flags += f" --dataloader_num_workers 0 --output_dir {tmp_path / 'out'}"
    fault = Fault("train.training_step", 2, "kill")
    assert run(f"{flags} --eval_samples {before}", tmp_path, faults=(fault,)).code < 0
    ended = run(f"{flags} --eval_samples {after}{RESUME}", tmp_path)
    assert ended.code == 0, ended.err[-2000:]
    found = set(ended.result["eval"]) - {"num_cut", "questions"}
    assert found == {"n", "exact_match_before" if before else "exact_match"}
    card = (tmp_path / "out/README.md").read_text()
    assert ("% before (8 samples)" if before else "% after (8 samples)") in card


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_goes_on_under_another_strategy(
    config: str, killed: Path, data_flags: str, references: dict[str, Path], tmp_path: Path
) -> None:
    """From one process to FSDP2 or ZeRO-3 on one: not bitwise, but the same course."""
    shutil.copytree(killed, tmp_path / "out")
    flags = f"{FLAGS}{data_flags} --output_dir {tmp_path / 'out'}{RESUME} --lora_dropout 0.1"
    ended = run(flags, tmp_path, config)
    assert ended.code == 0, ended.err[-3000:]
    expected = load_file(references["single"] / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert (tensor - expected[name]).abs().max() < 2e-3, name


@pytest.mark.slow
def test_finished_run(references: dict[str, Path], data_flags: str, tmp_path: Path) -> None:
    """Resuming it prints its result once more and exits with 0; starting it again is refused, never resumed."""
    shutil.copytree(references["single"], tmp_path / "out")
    flags = f"{FLAGS}{data_flags} --output_dir {tmp_path / 'out'}"
    ended = run(flags + RESUME, tmp_path)
    assert ended.code == 0 and "finished already" in ended.out and ended.result["global_step"] == NUM_STEPS
    ended = run(flags, tmp_path)
    assert ended.code == 2 and "is not empty" in ended.error


@pytest.mark.slow
def test_size(references: dict[str, Path]) -> None:
    """At most 1.2 times the trained state, fp32 and two moments, and 100 KB."""
    for output_dir in references.values():
        adapter = load_file(output_dir / "adapter_model.safetensors")
        state_bytes = 12 * sum(tensor.numel() for tensor in adapter.values())
        checkpoint = output_dir / f"checkpoint-{NUM_STEPS}"
        assert sum(path.stat().st_size for path in checkpoint.iterdir()) <= 1.2 * state_bytes + 100_000
        assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}, "nothing is pickled"
        assert len(list(output_dir.glob("checkpoint-*"))) == 2, "--save_total_limit"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal(signum: int, data_flags: str, references: dict[str, Path], tmp_path: Path) -> None:
    """In the middle of an update: the last one is kept, within seconds; resumed, the run ends where it would have."""
    name = {signal.SIGTERM: "terminate", signal.SIGINT: "interrupt"}[signum]
    flags = f"{FLAGS}{data_flags} --output_dir {tmp_path / 'out'}"
    start = time.monotonic()
    ended = run(flags, tmp_path, faults=(Fault("train.training_step", 15, name),))
    assert ended.code == 128 + signum, ended.err[-3000:]
    assert time.monotonic() - start < 60, "start and seven updates included"
    assert "Kept step 7" in ended.out and (tmp_path / "out" / "checkpoint-7").is_dir()
    assert run(flags + RESUME, tmp_path).code == 0
    assert_same_run(tmp_path / "out", references["single"])


@pytest.mark.slow
def test_signal_within_a_save(data_flags: str, tmp_path: Path) -> None:
    """The checkpoint is finished first."""
    flags = f"{FLAGS}{data_flags} --output_dir {tmp_path / 'out'}"
    ended = run(flags, tmp_path, faults=(Fault("training.checkpoint_files.write_durably", 2, "terminate"),))
    assert ended.code == 143 and "Kept step 3" in ended.out, ended.err[-2000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "checkpoint-3" in names and not any(name.startswith(".tmp-") for name in names)


@pytest.mark.slow
def test_launcher_is_terminated(data_flags: str, tmp_path: Path) -> None:
    """`accelerate launch` ends alone: the run that it leaves behind ends too and keeps its last update."""
    command = "accelerate launch --config_file accelerate_configs/single.yaml train.py"
    command += f" {FLAGS}{data_flags} --output_dir {tmp_path / 'out'} --max_steps 100000 --no_rehearse"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command.split(), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not list((tmp_path / "out").glob("checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        [trainer] = psutil.Process(launcher.pid).children()
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()
        psutil.wait_procs([trainer], timeout=30)
    assert not trainer.is_running()
    assert "Kept step" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "action"),
    [("ddp", "terminate"), ("fsdp2", "terminate"), ("fsdp2", "kill"), ("zero2", "terminate"), ("zero3", "terminate")],
)
def test_two_processes(config: str, action: str, data_flags: str, tmp_path: Path) -> None:
    """Terminated on one process in the middle of an update, both stop together; killed, both are gone, and the last
    checkpoint is there. Resumed, bitwise as undisturbed."""
    flags = f"{TWO_PROCESSES}{data_flags} --eval_dataset data/demo/validation.json --eval_samples 2"
    flags += " --max_new_tokens 2 --output_dir"  # a rehearsal that answers before the checkpoint is read
    folders = [tmp_path / "undisturbed", tmp_path / "terminated"]
    ended = run(f"{flags} {folders[0]}", tmp_path / "logs", config, 2)
    assert ended.code == 0, ended.err[-3000:]
    fault = Fault("train.training_step", 15, action)
    ended = run(f"{flags} {folders[1]}", tmp_path / "logs", config, 2, faults=(fault,))
    assert ended.code == (143 if action == "terminate" else -signal.SIGKILL), ended.err[-3000:]
    assert ("Kept step 7" in ended.out) == (action == "terminate")
    ended = run(f"{flags} {folders[1]}{RESUME}", tmp_path / "logs", config, 2)
    assert ended.code == 0, ended.err[-3000:]
    assert_same_run(folders[1], folders[0])
