"""What a trace is told because weights, and what is computed from them, have no data.

Fake tensors have shapes, not values. Some code of the libraries looks at values all the same: whether an answer has
ended, whether a norm is finite. Each such question is answered here with what is true of the traced step: gradients
are finite numbers, and answers as long as asked for.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from peft.tuners.lora import dora
from torch import nn
from transformers import GenerationMixin

from layers.quantization import dequantize


# Who may call `.item()` on a traced tensor: the file's path ends like this, in this function. True or a flag above
# zero would mean an overflow, an invalid norm or an answer that has ended; numbers are norms and step counts.
READERS = {
    ("accelerate/utils/deepspeed.py", "get_global_grad_norm"),
    ("deepspeed/runtime/utils.py", "is_invalid_grad_norm"),
    ("deepspeed/runtime/zero/stage3.py", "complete_grad_norm_calculation_for_cpu_offload"),
    ("deepspeed/runtime/zero/stage3.py", "has_overflow"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "complete_grad_norm_calculation_for_cpu_offload"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "has_overflow"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "update_offload_overflow_tracker"),
    ("torch/optim/optimizer.py", "_get_value"),
    ("transformers/generation/logits_process.py", "__call__"),
    ("transformers/generation/utils.py", "__call__"),
    ("transformers/generation/utils.py", "_get_logits_processor"),
    ("transformers/generation/utils.py", "_prepare_special_tokens"),
    ("transformers/generation/utils.py", "generate"),
}


class ItemAnswers:
    """Answers `.item()`: False for a flag, 1.0 for a number. A reader that is not on the list is named once on stderr:
    it may choose another branch in a real run."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()

    def answer(self, tensor: torch.Tensor) -> bool | float:
        value = False if tensor.dtype in (torch.bool, torch.uint8) else 1.0
        file, function, line = _reader()
        where = f"{function} ({file}:{line})"
        if not any(file.endswith(path) and function == name for path, name in READERS) and where not in self.unknown:
            self.unknown.add(where)
            print(
                f"warning: {where} reads a number, which a prediction does not have. It was told {value}: in a run "
                "it may do something else, and need other memory",
                file=sys.stderr,
            )
        return value


def _reader() -> tuple[str, str, int]:
    """File, function and line of the code that called `.item()`, bool() or float() on a tensor."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        # Between the reader and here are only torch's dispatch and the recorder.
        if not any(part in file for part in ("/torch/utils/", "/torch/_", "/memory/recorder.py", "/memory/known.py")):
            return file, frame.f_code.co_name.strip("<>"), frame.f_lineno
        frame = frame.f_back
    return "", "", 0


@contextmanager
def known_length(num_tokens: int = 2) -> Iterator[None]:
    """After each token `generate` checks whether all answers have ended: they have after so many, by default
    answer_worst_case's."""
    so_far = itertools.count()
    with patch.object(GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: next(so_far) < num_tokens):
        yield


@contextmanager
def known_quantization() -> Iterator[None]:
    """DoRA needs unquantized weights. PEFT recognizes a quantized one by its class, which a fake tensor lacks."""

    def weight_of(layer: nn.Module) -> torch.Tensor:
        state = getattr(layer.weight, "quant_state", None)
        return layer.weight if state is None else dequantize(layer.weight, state)

    with patch.object(dora, "dequantize_module_weight", weight_of):
        yield
