"""Predict a run's memory in a process beside it: a trace patches modules that the run itself uses.

    forecast = Forecast(config.step_flags, accelerator, longest_row=Row(num_tokens=700, num_images=1))
    forecast.poll()                # None until it is done, then what memory_probe.py reports
    forecast.stop()

    diagnosis = Forecast(config.step_flags, accelerator, explain=True).wait(timeout_seconds=300)
    diagnosis["changes"], diagnosis["nearest"]    # each change of a flag traced; the first with which it fits

That process cannot harm the run: it has the lowest priority, sees no GPU, and is the first that Linux kills when host
RAM runs out. If it fails, `problem` says why.
"""

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from child_processes import child_command
from data.worst_case import Row
from memory.cards import this_gpu
from utils import GIB, UserError


ROOT = Path(__file__).parent.parent
PROBE = ["-m", "memory.probe"]
LAUNCHER_VARIABLES = ("ACCELERATE_", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "FSDP_")  # prefixes
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Forecast:
    """A prediction that another process is computing.

    Args:
        step_flags: StepConfig.step_flags.
        accelerator: the run's. It gives the strategy; device and budget are this machine's.
        longest_row: the largest row of the run's data; None: `max_seq_len` tokens with an image, the worst case.
        explain: also trace what could be changed.
    """

    def __init__(
        self,
        step_flags: dict[str, Any],
        accelerator: Accelerator,
        longest_row: Row | None = None,
        explain: bool = False,
    ) -> None:
        self.result: dict[str, Any] | None = None
        self.problem: str | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="memory_forecast_")
        folder = Path(self._folder.name)
        flags = step_flags | launch_flags(accelerator, folder) | device_flags()
        if longest_row is not None:
            flags |= {"max_seq_len": longest_row.num_tokens, "images_per_sample": longest_row.num_images}
            flags["image_size"] = "{}x{}".format(*longest_row.image_size)
        (folder / "flags.yaml").write_text(yaml.safe_dump(flags | {"mode": "predict", "explain": explain}))
        self._process = self._start(child_command([*PROBE, "--recipe", str(folder / "flags.yaml")]))

    def _start(self, command: list[str]) -> psutil.Popen:
        folder = Path(self._folder.name)
        with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
            process = psutil.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=quiet_environment(),
                start_new_session=True,  # Ctrl-C is the run's
            )
        with suppress(psutil.Error, OSError):  # it has ended already, or this is not Linux
            process.nice(19)
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        return process

    def poll(self) -> dict[str, Any] | None:
        """The prediction, or None while it is computed, or None with `problem` set. Never waits."""
        if self.result is None and self.problem is None and self._process.poll() is not None:
            self._read()
        return self.result

    def wait(self, timeout_seconds: float) -> dict[str, Any] | None:
        """Wait for the prediction. None if it fails or takes longer: `problem` says why."""
        with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
            self._process.wait(timeout_seconds)
        self.stop(f"it took longer than {timeout_seconds:.0f} seconds")
        return self.result

    def stop(self, why: str = "the run ended before it was computed") -> None:
        """Read the prediction if it is done, else end the process: `why` becomes the problem."""
        self.poll()
        if self.result is None and self.problem is None:
            self.problem = why
            with suppress(psutil.NoSuchProcess):
                for process in [*self._process.children(recursive=True), self._process]:
                    process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._folder.cleanup()

    def _read(self) -> None:
        folder = Path(self._folder.name)
        code = self._process.returncode
        words = (folder / "stderr").read_text().strip().splitlines() or [f"memory.probe ended with {code}"]
        try:
            lines = (folder / "stdout").read_text().splitlines() if code == 0 else []
            self.result = json.loads(lines[-1])
        except (IndexError, ValueError):
            self.problem = words[-1].removeprefix("error: ")


def launch_flags(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """The launch config's strategy as memory_probe.py's flags, with the run's own DeepSpeed JSON."""
    world_size, kind = accelerator.num_processes, accelerator.distributed_type
    if kind == DistributedType.NO:
        return {"strategy": "single"}
    if kind not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return {"strategy": "ddp", "world_size": world_size}
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": kind.value} | engine_settings(kind)))
    return {"config_file": str(path), "world_size": world_size}


def engine_settings(kind: DistributedType) -> dict[str, Any]:
    """Those of the launch config, as accelerate's launcher has handed them on. Raises UserError."""
    if kind == DistributedType.FSDP:
        settings = {name.lower(): value for name, value in os.environ.items() if name.startswith("FSDP_")}
        return {"fsdp_config": {name: yaml.safe_load(value) for name, value in settings.items()}}
    json_path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if json_path is None:
        raise UserError("the launch config names no deepspeed_config_file")
    return {"deepspeed_config": {"deepspeed_config_file": str(Path(json_path).absolute())}}


def device_flags() -> dict[str, Any]:
    """The device that this process trains on, and its memory as the budget."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "budget_gib": psutil.virtual_memory().total / GIB}
    return {"device": "cuda", "gpu": this_gpu(), "budget_gib": torch.cuda.mem_get_info()[1] / GIB}


def quiet_environment() -> dict[str, str]:
    """This process's environment without GPUs and without the launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES) and k not in RANK_VARIABLES}
    # The run may have been started in another folder.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
