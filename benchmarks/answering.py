"""How long a GPU takes to answer questions about images, and the memory it needs: results/gpu/answering.json.

    python -m benchmarks.answering    # needs a GPU of 16 GB; a minute, adds the rows that are missing

The model and the generation are eval.py's, on full prompts with one image each. The weights are random, so no answer
ends before its last token; each batch is answered with few tokens and with more, which tells what the prompt takes and
what each further token takes. Images are not opened here: benchmarks/loader.py measures that.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from benchmarks.rows import Rows, RowsConfig, machine
from data.worst_case import Row, worst_case_questions
from eval import EvalConfig, prepare_model
from models.generation import generate_tokens
from models.loading import load_processor
from step import StepConfig, build_accelerator
from utils import UserError, check_minimum, flag, run_script


FEW, MORE = 2, 18  # tokens of an answer: a letter and the end, a sentence
REPEATS = 5
IMAGE_SIZE = (1024, 768)  # a photograph's, as benchmarks/loader.py has them


@dataclass(kw_only=True)
class AnsweringConfig(RowsConfig):
    model: str = flag("mgm-2b", "a preset, with random weights, or a folder")
    num_tokens: int = flag(1024, "of a prompt, those of its image included")
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "questions answered at once"})
    output: str = "results/gpu/answering.json"

    def __post_init__(self) -> None:
        check_minimum(self, num_tokens=1)
        if min(self.batch_sizes) < 1:
            raise UserError(f"--batch_sizes {min(self.batch_sizes)}: it must be at least 1")


def main(config: AnsweringConfig) -> dict[str, Any]:
    settings = {"version": 1, "model": config.model, "num_tokens": config.num_tokens}
    rows = Rows(Path(config.output), settings, config.overwrite, **machine("torch", "transformers"))
    if missing := rows.missing({"batch_size": size} for size in config.batch_sizes):
        eval_config = EvalConfig(model=config.model)
        accelerator = build_accelerator(eval_config.mixed_precision, micro_batch_size=1)
        with accelerator.device:  # random weights are drawn there quickly
            model = prepare_model(accelerator, eval_config)
        for flags in missing:
            rows.add({"flags": flags} | measure(accelerator, model, config, **flags))
    return {"rows": len(rows.result["rows"]), "output": config.output}


def measure(accelerator: Accelerator, model: nn.Module, config: AnsweringConfig, batch_size: int) -> dict[str, Any]:
    """Seconds until a batch's answers have FEW tokens; of each further token; and the peak of all tensors in bytes,
    None on a CPU."""
    flags = StepConfig(model=config.model, max_seq_len=config.num_tokens + 1, per_device_eval_batch_size=batch_size)
    row = Row(flags.max_seq_len, num_images=1, image_size=IMAGE_SIZE)
    prompts = send_to_device(worst_case_questions(load_processor(config.model), flags, row), accelerator.device)
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    few, more = (seconds_of(accelerator, model, prompts, num_tokens) for num_tokens in (FEW, MORE))
    return {
        "answer_seconds": few,
        "token_seconds": (more - few) / (MORE - FEW),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if has_gpu else None,
    }


def seconds_of(accelerator: Accelerator, model: nn.Module, prompts: dict[str, torch.Tensor], num_tokens: int) -> float:
    """The median of REPEATS, after one that warms up."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        with accelerator.autocast():
            found = generate_tokens(model, prompts, num_tokens).cpu()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
        if found.shape[1] != num_tokens:
            raise UserError(f"--model: an answer ended after {found.shape[1]} tokens, choose one with random weights")
    return median(seconds[1:])


if __name__ == "__main__":
    run_script(main, AnsweringConfig)
