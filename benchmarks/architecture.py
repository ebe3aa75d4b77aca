"""The picture of MGM-2B's parts: what is frozen, what gets LoRA, what is trained in full, and how large each is."""

from dataclasses import dataclass

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from benchmarks.rows import read_result


FROZEN, IN_FULL, LORA = "#4e79a7", "#59a14f", "#e15759"
ARROWS = (
    ("small", "clip", ""),
    ("large", "convnext", ""),
    ("clip", "mining", "queries"),
    ("convnext", "mining", "keys and values"),
    ("mining", "projector", ""),
    ("projector", "language", "576 tokens"),
    ("text", "language", ""),
    ("language", "loss", ""),
)


@dataclass(frozen=True)
class Box:
    x: float  # the middle, in units of the picture's 100 x 32
    y: float
    width: float
    text: str
    colour: str | None = None  # of a part of the model; None: what goes in or comes out

    @property
    def height(self) -> float:
        return 9 if self.colour else 6

    def draw(self, axes: Axes) -> None:
        corner = (self.x - self.width / 2, self.y - self.height / 2)
        style = {"edgecolor": self.colour, "facecolor": f"{self.colour}2a", "linewidth": 1.5}
        if self.colour:
            axes.add_patch(FancyBboxPatch(corner, self.width, self.height, "round,pad=0,rounding_size=1", **style))
        axes.text(self.x, self.y, self.text, ha="center", va="center", fontsize=9, linespacing=1.4)


def architecture_picture() -> Figure:
    boxes, lora = model_boxes(), f"{lora_parameters():,}"
    figure = Figure(figsize=(9, 2.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 32))
    axes.axis("off")
    for box in boxes.values():
        box.draw(axes)
    for start, end, label in ARROWS:
        draw_arrow(axes, boxes[start], boxes[end], label)
    names = {
        FROZEN: "frozen",
        LORA: f"frozen, with LoRA r=16 on q, v and o: {lora} trained",
        IN_FULL: "trained in full",
    }
    patches = [Patch(edgecolor=colour, facecolor=f"{colour}2a", label=name) for colour, name in names.items()]
    axes.legend(handles=patches, loc="lower center", ncols=3)
    return figure


def model_boxes() -> dict[str, Box]:
    parts = {name: f"\n{number:,}" for name, number in read_result("mgm_2b.json")["parts"].items()}
    return {
        "small": Box(6, 25, 12, "image,\n336 x 336"),
        "large": Box(6, 12, 12, "same image,\n768 x 768"),
        "clip": Box(22, 25, 14, "CLIP ViT-L" + parts["vision_tower"], FROZEN),
        "convnext": Box(22, 12, 14, "ConvNeXt-L" + parts["vision_tower_aux"], FROZEN),
        "mining": Box(44, 25, 16, "patch info mining" + parts["patch_info_mining"], IN_FULL),
        "projector": Box(62, 25, 11, "projector" + parts["multi_modal_projector"], IN_FULL),
        "text": Box(62, 12, 10, "text tokens"),
        "language": Box(83, 25, 15, "Gemma-2B" + parts["language_model"], LORA),
        "loss": Box(83, 12, 15, "loss, chunk by chunk,\nwithout logits"),
    }


def draw_arrow(axes: Axes, start: Box, end: Box, label: str) -> None:
    """Down a column, along a row, or up and to the right, with the label above it or to its right."""
    is_level = start.y == end.y
    if start.x == end.x:
        ends = (start.x, start.y - start.height / 2), (end.x, end.y + end.height / 2)
    else:
        ends = (start.x + start.width / 2, start.y), (end.x - end.width / 2, end.y - (0 if is_level else 2.5))
    axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": rcParams["text.color"]})
    x, y = (sum(pair) / 2 for pair in zip(*ends, strict=True))
    place = {"ha": "center", "va": "bottom"} if is_level else {"ha": "left", "va": "top"}
    axes.text(x + (0 if is_level else 1), y + (0.8 if is_level else 0), label, fontsize=8, **place)


def lora_parameters() -> int:
    """What LoRA with rank 16 adds: all that is trained, without what is trained in full beside it."""
    result = read_result("mgm_2b.json")
    (row,) = (row for row in result["lora"] if row["flags"] == {"lora_r": 16, "lora_alpha": 32})
    return row["trainable_params"] - result["parts"]["patch_info_mining"] - result["parts"]["multi_modal_projector"]
