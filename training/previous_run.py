"""What an earlier run has left in the output folder: removed once the new run has trained, untouched until then.

While the old adapter is there so are its card and its run.json, and nothing of the new run but curves. So whenever a
run is killed, the folder holds an adapter that says what it is, or none.
"""

import os
import shutil
from pathlib import Path

from training.checkpoints import RUN_JSON, remove_checkpoints
from training.out_of_memory import SNAPSHOT


TENSORBOARD = "tensorboard"  # the folder of the event files inside the output folder
CARD = "README.md"
# Without the first two nothing loads the weights that are left, so they go first. run.json, which marks the folder as
# a run's, goes last.
MODEL_FILES = ("adapter_config.json", "config.json", "adapter_model.*", "model.safetensors", "model-*.safetensors")
MODEL_FILES += ("model.safetensors.index.json", "generation_config.json", SNAPSHOT)
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class PreviousRun:
    """The state of the output folder before the new run writes to it. For the main process."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.is_there = output_dir.exists()
        self.curves = self._curves()

    def remove(self) -> None:
        """All that a run writes; files of other names are somebody else's."""
        remove_checkpoints(self.output_dir, num_kept=0)
        is_run = (self.output_dir / RUN_JSON).is_file()  # else the README is not a run's card
        names = [*MODEL_FILES, *PROCESSOR_FILES, *((CARD, RUN_JSON) if is_run else ())]
        for path in [path for name in names for path in self.output_dir.glob(name)]:
            os.unlink(path)
        for path in self.curves:
            os.unlink(path)

    def restore(self) -> None:
        """Take back what the new run has written so far, which are its curves alone."""
        if not self.is_there:
            shutil.rmtree(self.output_dir, ignore_errors=True)
            return
        for path in self._curves() - self.curves:
            os.unlink(path)
        if not self.curves:
            shutil.rmtree(self.output_dir / TENSORBOARD, ignore_errors=True)

    def _curves(self) -> set[Path]:
        return {path for path in (self.output_dir / TENSORBOARD).rglob("*") if path.is_file()}
