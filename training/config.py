"""The flags of train.py."""

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from step import StepConfig
from utils import UserError, check_choice, check_minimum, flag, free_on_resume


DEMO_RECIPE = Path(__file__).parent.parent / "recipes/demo.yaml"
# transformers' schedulers but those that need more settings than these flags have, such as a smallest learning rate.
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
POLYNOMIAL_END = 1e-7  # transformers' `lr_end`: the learning rate has to begin above it
# Each machine may have its own: where files lie, and for how many processes it has cores.
OWN_FLAGS = {"model", "dataset", "image_folder", "eval_dataset", "output_dir", "resume_from_checkpoint"}
OWN_FLAGS |= {"dataloader_num_workers"}


@dataclass(kw_only=True)
class TrainConfig(StepConfig):
    # Data
    dataset: str | None = free_on_resume(
        None, ".json, .jsonl, .parquet, folder or hub id; default: the demo, with recipes/demo.yaml"
    )
    image_folder: str | None = free_on_resume(None, "folder that image names start from; default: the data set's own")
    follow_links: bool = free_on_resume(False, "allow links out of the image folder")
    eval_dataset: str | None = free_on_resume(None, "held-out data, in the same forms; default: none, or the demo's")
    max_new_tokens: int | None = free_on_resume(
        None, "the longest held-out answer, in tokens; default: as long as the longest held-out reply"
    )
    image_aspect_ratio: str | None = flag(None, "pad | square (crops the middle); default: the model's own")
    group_by_length: bool = flag(False, "put samples of similar length into an update: less padding")
    allow_missing_end_of_turn: bool = free_on_resume(
        False, "train even if no token that stops generation ends the replies"
    )
    on_bad_sample: str = free_on_resume("error", "error: the run ends | skip: the sample is left out with a warning")
    max_bad_fraction: float = free_on_resume(0.01, "the run ends if it must skip more than this share of the data set")
    # The course of training
    learning_rate: float = flag(2e-4, "the highest learning rate, at the end of the warm-up")
    warmup_ratio: float = flag(0.03, "the warm-up's share of all updates")
    lr_scheduler_type: str = flag("cosine", " | ".join(SCHEDULERS))
    weight_decay: float = flag(0.0, "the optimizer's weight decay")
    num_train_epochs: int = free_on_resume(1, "passes over the data set")
    max_steps: int = free_on_resume(-1, "number of updates; -1 or 0: as --num_train_epochs says")
    # Output
    doctor: bool = free_on_resume(False, "only check whether this machine is ready to train --model")
    output_dir: str = free_on_resume("outputs/demo", "folder for adapter, checkpoints and logs")
    overwrite_output_dir: bool = free_on_resume(False, "replace the run that is in --output_dir")
    logging_steps: int = free_on_resume(10, "updates from one point in TensorBoard to the next")
    save_steps: int = free_on_resume(100, "updates from one checkpoint to the next; 0: none")
    save_total_limit: int = free_on_resume(2, "how many checkpoints to keep, the newest; 0: all")
    resume_from_checkpoint: str | None = free_on_resume(
        None, "a checkpoint's folder | latest: the newest in --output_dir"
    )
    forecast: bool = free_on_resume(True, "predict the run's memory in a second process, to compare with")
    rehearse: bool = free_on_resume(True, "run the largest step before the first: is there enough memory?")
    max_nonfinite_updates: int = free_on_resume(
        5, "the run ends after so many updates in a row with NaN or Inf, all skipped; 0: never"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_aspect_ratio is not None:
            check_choice("image_aspect_ratio", self.image_aspect_ratio, ("pad", "square"))
        check_choice("on_bad_sample", self.on_bad_sample, ("error", "skip"))
        check_minimum(self, max_bad_fraction=0)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        check_minimum(self, learning_rate=0, warmup_ratio=0, weight_decay=0, num_train_epochs=1, max_steps=-1)
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: it is a share of the updates, at most 1")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UserError(
                f"--learning_rate {self.learning_rate}: polynomial falls to {POLYNOMIAL_END}, start above it"
            )
        check_minimum(self, logging_steps=1, max_new_tokens=1)
        check_minimum(self, save_steps=0, save_total_limit=0, max_nonfinite_updates=0)

    @property
    def skips_bad_samples(self) -> bool:
        return self.on_bad_sample == "skip"

    @property
    def shared_flags(self) -> dict[str, Any]:
        """What must be the same on all machines."""
        return {name: value for name, value in asdict(self).items() if name not in OWN_FLAGS}

    @staticmethod
    def default_recipe(flags: Namespace) -> Path | None:
        """Without a data set the demo is trained on, and the demo has its own batch and learning rate."""
        return DEMO_RECIPE if flags.dataset is None else None
