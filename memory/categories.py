"""What memory is used for: the categories of a breakdown, in the order of tables and pictures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    name: str  # in results and in code
    title: str  # for a reader
    colour: str  # in pictures


CATEGORIES = (
    Category("weights", "frozen weights", "#4e79a7"),
    Category("trained", "trained parameters", "#59a14f"),
    Category("gradients", "gradients", "#f28e2b"),
    Category("optimizer", "optimizer state", "#edc948"),
    Category("batch", "batch", "#bab0ac"),
    Category("activations", "activations", "#76b7b2"),
    Category("loss", "logits and loss", "#e15759"),
    Category("vision", "vision side", "#b07aa1"),
    Category("temporaries", "temporaries", "#9c755f"),
    Category("communication", "communication", "#ff9da7"),
)
TITLES = {category.name: category.title for category in CATEGORIES}
# These four stay from step to step, so a run can look them up too.
RESIDENT = ("weights", "trained", "gradients", "optimizer")
