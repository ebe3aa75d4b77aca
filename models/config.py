"""The flags of every script that loads a model, and the precision that a machine computes in."""

from dataclasses import dataclass
from pathlib import Path

import torch

from utils import UserError, check_choice, flag, free_on_resume


ROOT, TINY_MGM = Path(__file__).parent.parent, "data/tiny_mgm"
ATTN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
MIXED_PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class ModelConfig:
    """The flags of every script that loads a model."""

    model: str = flag(TINY_MGM, "folder or hub id; for memory_probe.py also a preset")
    attn_implementation: str = free_on_resume("sdpa", " | ".join(ATTN_IMPLEMENTATIONS))
    mixed_precision: str = free_on_resume("auto", "no | fp16 | bf16 | auto: bf16 or else fp16 on a GPU, no on a CPU")

    def __post_init__(self) -> None:
        self.model = find_tiny_mgm(self.model)
        check_choice("attn_implementation", self.attn_implementation, ATTN_IMPLEMENTATIONS)
        check_choice("mixed_precision", self.mixed_precision, ("auto", *MIXED_PRECISIONS))
        self.mixed_precision = self.resolve_precision()

    def resolve_precision(self) -> str:
        return resolve_mixed_precision(self.mixed_precision)


def find_tiny_mgm(model: str | None) -> str | None:
    """The default model's folder, also where a script is started in another folder. Other names stay."""
    return str(ROOT / TINY_MGM) if model == TINY_MGM and not Path(model).is_dir() else model


def resolve_mixed_precision(mixed_precision: str) -> str:
    """`auto` to bf16 on a GPU that has it, fp16 on an older one, no on a CPU (few have bf16 units; others emulate).

    Raises:
        UserError: the machine cannot compute in the precision asked for.
    """
    has_gpu = torch.cuda.is_available()
    has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if mixed_precision == "auto":
        return ("bf16" if has_bf16 else "fp16") if has_gpu else "no"
    if mixed_precision == "fp16" and not has_gpu:
        raise UserError("--mixed_precision fp16: this machine has no GPU, and CPUs train in 'no' or 'bf16'")
    if mixed_precision == "bf16" and has_gpu and not has_bf16:
        raise UserError(f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bf16 units, choose fp16")
    return mixed_precision
