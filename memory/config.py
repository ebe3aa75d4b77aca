"""ProbeConfig: the flags of memory_probe.py, a step's and what is asked about it."""

import math
import re
from dataclasses import dataclass

import torch
from PIL import Image

from memory.cards import GPUS, find_gpu
from memory.strategy import STRATEGIES, Strategy
from models.config import resolve_mixed_precision
from step import StepConfig
from utils import GIB, UserError, check_choice, check_minimum, flag


@dataclass(kw_only=True)
class ProbeConfig(StepConfig):
    model: str = flag("mgm-2b", "folder or hub id; for memory_probe.py also a preset")
    images_per_sample: int = flag(1, "images in each row of the batch")
    image_size: str = flag("640x480", "WxH: pixels of each image as the data has it, before --max_image_pixels")
    mode: str | None = flag(None, "predict | measure | both; default: measure where there is a GPU, else predict")
    device: str | None = flag(None, "cuda | cpu: what is predicted or measured; predict defaults to cuda")
    strategy: str = flag("single", " | ".join(STRATEGIES))
    offload: str = flag("none", "none | optimizer | param: what DeepSpeed or FSDP2 keeps in host memory")
    world_size: int | None = flag(None, "processes, on one host; default: as --config_file says, else 1")
    config_file: str | None = flag(None, "accelerate_configs/X.yaml: strategy, offload and bucket sizes from there")
    gpu: str = flag(
        "rtx4090",
        "card to predict for: rtx3050 ... rtx5090, rtxa6000, a100, h100, l4, t4 ... and, in an unusual size, "
        "rtx4060ti-16gb; all in docs/gpus.md",
    )
    budget_gib: float | None = flag(None, "GiB that the step may use of the device, for a card that --gpu lacks")
    sweep: list[str] | None = flag(None, "KEY=V1,V2 ...: probe every combination")
    output: str | None = flag(
        None, "folder for the result, of a prediction with a picture, a page and a snapshot; a sweep's: outputs/sweep"
    )
    explain: bool = flag(False, "what to change first; each suggestion is traced, which takes a minute or two")
    calibrate: bool = flag(False, "measure this GPU's entry of memory/cards.py")

    def __post_init__(self) -> None:
        has_gpu = torch.cuda.is_available()
        self.mode = self.mode or ("measure" if has_gpu else "predict")
        check_choice("mode", self.mode, ("predict", "measure", "both"))
        self.device = self.device or ("cuda" if has_gpu or self.mode == "predict" else "cpu")
        check_choice("device", self.device, ("cuda", "cpu"))
        if self.device == "cuda" and self.mode != "predict" and not has_gpu:
            raise UserError(f"--mode {self.mode} --device cuda: this machine has no GPU; predict, or choose cpu")
        self.gpu = find_gpu(self.gpu)  # the precision depends on it
        super().__post_init__()
        if self.world_size is not None:
            check_minimum(self, world_size=1)
        if self.sweep is None:  # a sweep's rows are configs of their own
            self.resolve_launch()
        check_minimum(self, images_per_sample=0)
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", self.image_size):
            raise UserError(f"--image_size {self.image_size}: write width and height in pixels, such as 640x480")
        if math.prod(self.photo_size) > Image.MAX_IMAGE_PIXELS:
            most = f"{Image.MAX_IMAGE_PIXELS:,}"
            raise UserError(f"--image_size {self.image_size}: at most {most} pixels, as in training")
        if self.explain and self.mode == "measure":
            raise UserError("--explain: it explains a prediction; choose --mode predict or both")
        if self.budget_gib is not None and not 0 < self.budget_gib < math.inf:  # NaN is neither
            raise UserError(f"--budget_gib {self.budget_gib}: it must be above 0, and finite")

    def resolve_launch(self) -> None:
        """Strategy, offload and number of processes as `config_file` has them; a number that was given wins."""
        launch = self.launch
        if self.config_file is not None:
            for name, found, default in (("strategy", launch.name, "single"), ("offload", launch.offload, "none")):
                given = getattr(self, name)
                if given not in (found, default):
                    raise UserError(f"--{name} {given}: --config_file {self.config_file} says {found}, give one")
        self.strategy, self.offload, self.world_size = launch.name, launch.offload, launch.world_size

    def resolve_precision(self) -> str:
        """A prediction for a GPU depends on that card, not on this machine. A sweep's rows resolve their own."""
        if self.sweep is not None:
            return self.mixed_precision
        if self.device == "cpu" or self.mode != "predict":
            return resolve_mixed_precision(self.mixed_precision)
        gpu = GPUS[self.gpu]
        if self.mixed_precision == "auto":
            return "bf16" if gpu.has_bf16 else "fp16"
        if self.mixed_precision == "bf16" and not gpu.has_bf16:
            raise UserError(f"--mixed_precision bf16: {gpu.name} has no bf16 units, choose fp16")
        return self.mixed_precision

    @property
    def photo_size(self) -> tuple[int, int]:
        """`image_size` in numbers."""
        width, height = self.image_size.split("x")
        return int(width), int(height)

    @property
    def budget_bytes(self) -> int:
        return GPUS[self.gpu].capacity_bytes if self.budget_gib is None else int(self.budget_gib * GIB)

    @property
    def launch(self) -> Strategy:
        """The strategy that the flags choose. Raises UserError for what cannot be."""
        if self.config_file is not None:
            return Strategy.from_config_file(self.config_file, self.world_size)
        return Strategy.from_flags(self.strategy, self.offload, self.world_size or 1)

    @property
    def cublas_workspace_bytes(self) -> int:
        """Of each of two handles: that of the thread that runs forward, and autograd's."""
        return GPUS[self.gpu].family.cublas_workspace_bytes if self.device == "cuda" else 0
