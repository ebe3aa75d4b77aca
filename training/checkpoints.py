"""Checkpoints: a run that was killed can be resumed, and then ends bitwise where an undisturbed run ends.

A checkpoint holds what training changes, not the frozen weights. Its checksums are compared before anything is read.
Nothing is pickled: accelerate's and DeepSpeed's own checkpoints are, and hold the frozen weights too.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from training.checkpoint_files import (
    find_damage,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_checkpoints,
    write_checkpoint,
)
from training.config import TrainConfig
from training.out_of_memory import SNAPSHOT
from training.previous_run import RUN_JSON
from training.processes import items_of_main, of_main
from training.random_state import load_rng_state, rng_state, rng_state_from_json, rng_state_to_json
from training.run_log import RunLog
from training.training_state import TrainingState
from utils import BadSample, Interrupted, LostWorker, UserError, brief_error, check_writable, flags_free_on_resume


LATEST = "latest"


@dataclass(frozen=True)
class Position:
    """How many updates are done in total, the epoch, and how many updates of it are done."""

    global_step: int = 0
    epoch: int = 0
    update: int = 0


class Checkpoints:
    """Saves the run: every `save_steps` updates, at the end, and when the run is stopped.

    Parameters and optimizer state change only at the end of an update. Random state and log change all the time, so
    they are copied after each update. A save in the middle of an update therefore writes the end of the last one.

    Args:
        settings: what must be the same when the run is resumed (`run_settings`), with the number of `updates`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        state: TrainingState,
        log: RunLog,
        settings: dict[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = Path(config.output_dir)
        self.save_steps, self.save_total_limit = config.save_steps, config.save_total_limit
        self.state = state
        self.log = log
        self.settings = settings
        self.num_steps = settings["updates"]
        self.saved_step = 0
        self.noted: tuple[Position, dict[str, Any], tuple[dict[str, Any], torch.Tensor]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Save the last update if all processes have stopped together."""
        if isinstance(error, (Interrupted, BadSample, LostWorker)):
            self.save()
            kept = f"Kept step {self.saved_step}: go on with --resume_from_checkpoint latest"
            if self.saved_step and isinstance(error, LostWorker):
                error.add_note(kept)
            elif self.saved_step:
                self.accelerator.print(kept)

    def resume(self, path: Path) -> None:
        """Restore everything to what it was when the checkpoint was written. The main process reads it for all."""
        saved = of_main(self.accelerator, lambda: read_state(path))
        self.state.load_tensors(items_of_main(self.accelerator, lambda: read_tensors(path)))
        self.state.load_values(saved)
        self.log.load_state_dict(saved["log"])
        if len(saved["rng"]) == self.accelerator.num_processes:
            load_rng_state(rng_state_from_json(saved["rng"][self.accelerator.process_index]))
        else:
            processes = f"{len(saved['rng'])} processes, now {self.accelerator.num_processes}"
            self.accelerator.print(f"Resuming with other random numbers: the checkpoint is from {processes}")
        self.saved_step = saved["position"]["global_step"]
        self.accelerator.print(f"Resumed from {path}: {self.saved_step} updates are done")

    def update(self, position: Position, is_skipped: bool = False) -> None:
        """After each update. Skipped updates are not saved: they would push good checkpoints out."""
        if is_skipped and self.noted is None:
            return  # nothing has been trained yet
        self.noted = position, rng_state(), self.log.state()
        is_due = position.global_step % (self.save_steps or math.inf) == 0 or position.global_step == self.num_steps
        if self.save_steps and is_due and not is_skipped:
            self.save()

    def save(self) -> None:
        """Save the last update, unless it is saved already. All processes call together.

        Raises:
            UserError: the disk is full or cannot be written; the earlier checkpoints are as they were.
        """
        if self.noted is None or self.saved_step == self.noted[0].global_step:
            return
        position, rng, log_state = self.noted
        content = {
            "position": asdict(position),
            "settings": self.settings,
            **self.state.values(),
            "log": self.log.state_dict(log_state),
            "rng": gather_object([rng_state_to_json(rng)]),
        }
        error = None
        tensors = self.state.tensors()  # ZeRO and FSDP2 gather each from all processes, so all iterate
        try:
            if self.accelerator.is_main_process:
                write_checkpoint(self.output_dir, position.global_step, content, tensors)
                if self.save_total_limit:
                    remove_checkpoints(self.output_dir, self.save_total_limit)
        except OSError as os_error:
            error = brief_error(os_error)
        for _ in tensors:  # the other processes; and the rest on the main process, if its disk was full
            pass
        if any(gather_object([error])):
            before = f"the one of step {self.saved_step} is intact" if self.saved_step else "there is none before it"
            raise UserError(
                f"the checkpoint of step {position.global_step} cannot be written to {self.output_dir} ({error}); "
                f"{before}. Make room there, then --resume_from_checkpoint latest"
            )
        self.saved_step = position.global_step


def find_checkpoint(
    resume_from: str | None, output_dir: Path, settings: dict[str, Any], warn: Callable[[str], None]
) -> tuple[Path | None, Position]:
    """The checkpoint to resume from, and its position. If `resume_from` is None: None, and the beginning.

    Raises:
        UserError: there is no good one, or it was made with other settings.
    """
    if resume_from is None:
        return None, Position()
    if resume_from == LATEST:
        path = find_latest(output_dir, warn)
    elif damage := find_damage(path := Path(resume_from)):
        raise UserError(f"--resume_from_checkpoint {resume_from}: {damage}; choose another, or 'latest'")
    saved = read_state(path)
    check_settings(path, saved["settings"], settings)
    return path, Position(**saved["position"])


def find_latest(output_dir: Path, warn: Callable[[str], None]) -> Path:
    """The newest checkpoint without damage. Raises UserError if there is none."""
    for path in list_checkpoints(output_dir):
        if not (damage := find_damage(path)):
            return path
        warn(f"warning: {path} is left out: {damage}")
    raise UserError(
        f"--resume_from_checkpoint latest: no good checkpoint in {output_dir}; start again without it "
        "(and with --overwrite_output_dir)"
    )


def check_output_dir(config: TrainConfig) -> None:
    """Raise UserError if the folder cannot be written, or holds another run that is neither resumed nor replaced."""
    path, overwrite, resume_from = Path(config.output_dir), config.overwrite_output_dir, config.resume_from_checkpoint
    if Path(config.model).resolve() == path.resolve():
        raise UserError(f"--output_dir {path}: the model is there, choose another folder")
    is_resumed_here = resume_from == LATEST or (
        resume_from is not None and Path(resume_from).resolve().parent == path.resolve()
    )
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: this is a file, choose a folder")
    check_writable("output_dir", path)
    others = [child for child in path.iterdir() if child.name != SNAPSHOT] if path.exists() else []
    if others and not overwrite and not is_resumed_here:
        raise UserError(
            f"--output_dir {path} is not empty: choose another, add --resume_from_checkpoint latest or "
            "--overwrite_output_dir"
        )
    if overwrite and is_resumed_here:
        raise UserError("--overwrite_output_dir with --resume_from_checkpoint: the one removes what the other needs")


def finished_run(config: TrainConfig, data: dict[str, Any]) -> dict[str, Any] | None:
    """run.json's content if `--resume_from_checkpoint latest` finds a run with these flags at its end.

    Raises:
        UserError: it was trained on other `data`.
    """
    output_dir = Path(config.output_dir)
    run_json = output_dir / RUN_JSON
    is_saved = any((output_dir / name).is_file() for name in ("adapter_config.json", "config.json"))
    if config.resume_from_checkpoint != LATEST or not run_json.is_file() or not is_saved:
        return None
    result = json.loads(run_json.read_text())
    flags = asdict(config)
    names = flags.keys() - flags_free_on_resume(TrainConfig) | {"num_train_epochs", "max_steps"}
    is_same = all(result["config"].get(name) == flags[name] for name in names)
    if result["status"] != "done" or not is_same:
        return None
    if (trained_on := result.get("data", data)) != data:
        difference = _data_difference(trained_on, data)
        raise UserError(
            f"--resume_from_checkpoint latest: {output_dir} is finished, and {difference}. "
            "Use the same data, or choose another --output_dir to start a new run"
        )
    return result


def run_settings(config: TrainConfig, **derived: Any) -> dict[str, Any]:
    """The flags that must stay on resume, and `derived`: what the others amount to, which must stay too."""
    free = flags_free_on_resume(TrainConfig)
    return {name: value for name, value in asdict(config).items() if name not in free} | derived


# What several flags amount to.
DERIVED = {
    "samples_per_update": "--per_device_train_batch_size x --gradient_accumulation_steps x processes",
    "updates": "the number of updates (--max_steps or --num_train_epochs)",
}


def check_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError if settings differ; it names every difference."""
    now = json.loads(json.dumps(now))
    differences = []
    for name in sorted(saved.keys() | now.keys()):
        before, after = saved.get(name), now.get(name)
        if before == after:
            continue
        if name == "trained":
            differences += _shape_differences(before or {}, after or {})
        elif name == "data":
            differences.append(_data_difference(before, after))
        elif name == "lengths":
            if saved["data"] == now["data"]:  # other records have other lengths
                differences.append("the samples have other lengths in tokens: another tokenizer or chat template?")
        else:
            differences.append(f"{DERIVED.get(name, name)} was {before}, now {after}")
    if differences:
        raise UserError(
            f"--resume_from_checkpoint {path}: it was made with other settings: {'; '.join(differences)}. "
            "Use the same, or start a new run"
        )


def _data_difference(before: dict[str, Any] | str, after: dict[str, Any]) -> str:
    if isinstance(before, str):
        return "an earlier version of train.py made it, which did not note the records"
    if (num_before := before["num_records"]) != (num_after := after["num_records"]):
        return f"the data set had {num_before} records, now {num_after}"
    return f"the data set has {num_after} records as before, but their texts, image names or order differ"


def _shape_differences(before: dict[str, list[int]], after: dict[str, list[int]]) -> list[str]:
    """One line with their number and the first of them: there may be hundreds."""
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    first = names[0]
    return [f"{len(names)} trained parameters differ, {first} was {before.get(first)}, now {after.get(first)}"]
