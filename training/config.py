"""The flags of train.py."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from step import StepConfig
from utils import UserError, check_choice, check_minimum, free_on_resume


DEMO_RECIPE = Path(__file__).parent.parent / "recipes/demo.yaml"
# transformers' schedulers but those that need more settings than these flags have, such as a smallest learning rate.
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
POLYNOMIAL_END = 1e-7  # transformers' `lr_end`: the learning rate has to begin above it


@dataclass(kw_only=True)
class TrainConfig(StepConfig):
    # Data
    dataset: str | None = free_on_resume(
        None, ".json, .jsonl, .parquet, folder or hub id; without it the demo, with recipes/demo.yaml"
    )
    image_folder: str | None = free_on_resume(None, "default: the folder of the data set")
    follow_links: bool = free_on_resume(False, "allow links out of the image folder")
    eval_dataset: str | None = free_on_resume(None, "held-out data; the demo's for the demo")
    max_new_tokens: int | None = free_on_resume(
        None, "of a held-out answer; default: as many as the longest held-out reply has"
    )
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "pad | square; default: as the model's processor"}
    )
    group_by_length: bool = field(default=False, metadata={"help": "updates of similar lengths: less padding"})
    allow_missing_end_of_turn: bool = free_on_resume(
        False, "train even if no token that stops generation ends the replies"
    )
    on_bad_sample: str = free_on_resume("error", "error | skip: leave it out and say so")
    max_bad_fraction: float = free_on_resume(0.01, "of the data set: with more to skip the run ends")
    # The course of training
    learning_rate: float = field(default=2e-4, metadata={"help": "the highest, after the warm-up"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the updates"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": " | ".join(SCHEDULERS)})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    num_train_epochs: int = free_on_resume(1, "passes over the data set")
    max_steps: int = free_on_resume(-1, "updates; overrides num_train_epochs where positive")
    # Output
    doctor: bool = free_on_resume(False, "only look whether this machine is ready for --model")
    output_dir: str = free_on_resume("outputs/demo", "folder for adapter, checkpoints and logs")
    overwrite_output_dir: bool = free_on_resume(False, "replace the run that is in --output_dir")
    logging_steps: int = free_on_resume(10, "updates from one point in TensorBoard to the next")
    save_steps: int = free_on_resume(100, "updates from one checkpoint to the next; 0: none")
    save_total_limit: int = free_on_resume(2, "the newest checkpoints are kept; 0: all")
    resume_from_checkpoint: str | None = free_on_resume(None, "a checkpoint's folder, or latest")
    forecast: bool = free_on_resume(True, "predict the run's memory in a process beside it, to compare with")
    rehearse: bool = free_on_resume(True, "run the largest step once, unseen, before the first")
    max_nonfinite_updates: int = free_on_resume(
        5, "the run ends when so many in a row were skipped because of NaN or Inf; 0: never"
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

    @staticmethod
    def default_recipe(flags: Namespace) -> Path | None:
        """Without a data set the demo is trained on, and the demo has its own batch and learning rate."""
        return DEMO_RECIPE if flags.dataset is None else None
