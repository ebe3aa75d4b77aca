"""A checkpoint's files: written, checked, read and removed.

    <output_dir>/checkpoint-<step>/
        state.json             position in the data, settings, scheduler, loss scale, random state, log
        trained-00001.safetensors ...   trained parameters in fp32 and the optimizer's moments
        checksums.json         size and SHA-256 of the other files

A checkpoint is written to a folder whose name begins with `.tmp-`, synced to the disk, and renamed. So a kill at any
moment leaves the earlier checkpoints as they were, and at most a `.tmp-` folder, which the next run removes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from training.training_state import Tensors
from utils import brief_error


STATE, CHECKSUMS, TMP = "state.json", "checksums.json", ".tmp-"
SHARD_BYTES = 2**28  # the most that a file of tensors holds, and that saving holds in memory


def write_checkpoint(output_dir: Path, step: int, state: dict[str, Any], tensors: Tensors) -> None:
    """Write to a temporary folder, sync it to the disk, rename it. After an OSError nothing of it is left."""
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f"{TMP}checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        checksums = {}
        for number, shard in enumerate(in_shards(tensors), start=1):
            name = f"trained-{number:05d}.safetensors"
            checksums[name] = write_durably(temporary / name, safetensors.torch.save(shard))
        checksums[STATE] = write_durably(temporary / STATE, to_json(state))
        write_durably(temporary / CHECKSUMS, to_json(checksums))
        sync_folder(temporary)
        if final.exists():  # this run was resumed from an earlier checkpoint
            remove_folder(final)
        os.rename(temporary, final)
        sync_folder(output_dir)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def in_shards(tensors: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups of at most SHARD_BYTES; a larger tensor is a group of its own."""
    shard, nbytes = {}, 0
    for name, tensor in tensors:
        if shard and nbytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    yield shard


def write_durably(path: Path, content: bytes) -> list[int | str]:
    """Write and fsync. Returns size in bytes and SHA-256."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return [len(content), hashlib.sha256(content).hexdigest()]


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Rename it first, so that a kill leaves no half checkpoint."""
    doomed = path.with_name(f"{TMP}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_checkpoints(output_dir: Path, num_kept: int) -> None:
    """Remove all but the newest `num_kept`."""
    for path in list_checkpoints(output_dir)[num_kept:]:
        remove_folder(path)


def remove_temporaries(output_dir: Path) -> None:
    for path in output_dir.glob(f"{TMP}*"):
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")}
    return sorted((path for path, match in steps.items() if match), key=lambda p: -int(steps[p][1]))


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is what was written."""
    if not path.is_dir():
        return "no such folder"
    try:
        checksums = json.loads((path / CHECKSUMS).read_bytes())
        for name, (size, digest) in checksums.items():
            if name != STATE and not re.fullmatch(r"trained-\d+\.safetensors", name):
                return f"{name} in {CHECKSUMS} is no file of a checkpoint"
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is not what was written (checksum)"
        return None if STATE in checksums else f"{CHECKSUMS} does not have {STATE}"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({brief_error(error)})"
    except (ValueError, AttributeError, TypeError):
        return f"{CHECKSUMS} is damaged"


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_bytes())


def read_tensors(path: Path) -> Tensors:
    for file in sorted(path.glob("trained-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
