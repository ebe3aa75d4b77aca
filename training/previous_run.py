"""The earlier run in the output folder: kept until the new run has trained, then removed.

As long as the old adapter exists, so do its card and its run.json, and the new run has written nothing but curves. So
after a kill at any moment the folder holds an adapter with its own description, or no adapter.
"""

import os
import shutil
from pathlib import Path

from training.checkpoint_files import remove_checkpoints
from training.out_of_memory import SNAPSHOT


TENSORBOARD = "tensorboard"  # the folder of the event files inside the output folder
CARD = "README.md"
RUN_JSON = "run.json"  # the result of a finished run
# The first two go first: without them nothing loads the weights that are left. run.json goes last: it marks the folder
# as a run's.
MODEL_FILES = ("adapter_config.json", "config.json", "adapter_model.*", "model.safetensors", "model-*.safetensors")
MODEL_FILES += ("model.safetensors.index.json", "generation_config.json", SNAPSHOT)
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class PreviousRun:
    """What the output folder held before the new run wrote to it. For the main process."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.is_there = output_dir.exists()
        self.curves = self._curves()

    def remove(self) -> None:
        """Remove all files that a run writes. Files of other names belong to somebody else."""
        remove_checkpoints(self.output_dir, num_kept=0)
        is_run = (self.output_dir / RUN_JSON).is_file()  # without it the README is not a run's card
        names = [*MODEL_FILES, *PROCESSOR_FILES, *((CARD, RUN_JSON) if is_run else ())]
        for path in [path for name in names for path in self.output_dir.glob(name)]:
            os.unlink(path)
        for path in self.curves:
            os.unlink(path)

    def restore(self) -> None:
        """Remove what the new run has written so far: its curves."""
        if not self.is_there:
            shutil.rmtree(self.output_dir, ignore_errors=True)
            return
        for path in self._curves() - self.curves:
            os.unlink(path)
        if not self.curves:
            shutil.rmtree(self.output_dir / TENSORBOARD, ignore_errors=True)

    def _curves(self) -> set[Path]:
        return {path for path in (self.output_dir / TENSORBOARD).rglob("*") if path.is_file()}
