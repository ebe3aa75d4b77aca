"""How long a GPU takes to answer questions about images, and the memory it needs: results/answering.json.

    python -m benchmarks.answering --mode predict    # needs no GPU; each row takes seconds
    python -m benchmarks.answering --mode measure    # needs a GPU of 16 GB; a minute, adds the rows that are missing

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
from benchmarks.speed_tables import ANSWERED_TOKENS
from benchmarks.tables import write_tables
from data.worst_case import Row, worst_case_questions
from eval import EvalConfig, prepare_model
from memory.cards import GPUS
from memory.config import ProbeConfig
from memory.kernels import BLOCK_BYTES, kernels_of, workspaces_of
from memory.known import known_length
from memory.notes import noted
from memory.partly_fake import PartlyFakeMode
from memory.probed_step import Tensors, local_accelerator
from memory.recorder import Recorder
from memory.step_time import seconds_of
from memory.trace import fake_model
from models.generation import generate_tokens
from models.loading import load_model, load_processor
from step import StepConfig, build_accelerator
from utils import UserError, check_choice, check_minimum, flag, run_script


FEW, MORE = ANSWERED_TOKENS, 18  # of an answer: a letter and the end, a sentence
REPEATS = 5
IMAGE_SIZE = (1024, 768)  # a photograph's, as benchmarks/loader.py has them


@dataclass(kw_only=True)
class AnsweringConfig(RowsConfig):
    mode: str = flag("predict", "measure | predict")
    model: str = flag("mgm-2b", "a preset, with random weights, or a folder")
    num_tokens: int = flag(1024, "of a prompt, those of its image included")
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "questions answered at once"})
    gpus: list[str] = field(
        default_factory=lambda: ["rtx3060", "rtx4090", "h200"], metadata={"help": "cards to predict for: docs/gpus.md"}
    )
    output: str = "results/answering.json"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("measure", "predict"))
        check_minimum(self, num_tokens=1)
        if min(self.batch_sizes) < 1:
            raise UserError(f"--batch_sizes {min(self.batch_sizes)}: it must be at least 1")


def main(config: AnsweringConfig) -> dict[str, Any]:
    settings = {"version": 1, "model": config.model, "num_tokens": config.num_tokens}
    rows = Rows(Path(config.output), settings, config.overwrite)
    (predict_rows if config.mode == "predict" else measure_rows)(config, rows)
    write_tables()
    return {"measured": len(rows.result.get("rows", [])), "output": config.output}


def predict_rows(config: AnsweringConfig, rows: Rows) -> None:
    """Anew: the code may have changed since."""
    rows.result["predicted"] = []
    for gpu in config.gpus:
        for size in config.batch_sizes:
            rows.add({"flags": {"gpu": gpu, "batch_size": size}} | predict_row(config, gpu, size), "predicted")


def measure_rows(config: AnsweringConfig, rows: Rows) -> None:
    if not (missing := rows.missing({"batch_size": size} for size in config.batch_sizes)):
        return
    rows.result |= machine("torch", "transformers")
    eval_config = EvalConfig(model=config.model)
    accelerator = build_accelerator(eval_config.mixed_precision, micro_batch_size=1)
    with accelerator.device:  # random weights are drawn there quickly
        model = prepare_model(accelerator, eval_config)
    for flags in missing:
        prompts = send_to_device(full_prompts(config, flags["batch_size"]), accelerator.device)
        if has_gpu := torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        few, more = (measured_seconds(accelerator, model, prompts, num_tokens) for num_tokens in (FEW, MORE))
        peak_bytes = torch.cuda.max_memory_allocated() if has_gpu else None
        rows.add({"flags": flags} | row_of(few, more) | {"peak_allocated_bytes": peak_bytes})


def predict_row(config: AnsweringConfig, gpu: str, batch_size: int) -> dict[str, float]:
    """For a process in which nothing has been trained: a training step replaces some of transformers' functions."""
    few, more = (traced_seconds(config, gpu, batch_size, num_tokens) for num_tokens in (FEW, MORE))
    return row_of(few, more)


def row_of(few: float, more: float) -> dict[str, float]:
    """Seconds until a batch's answers have FEW tokens, and seconds of each further token."""
    return {"answer_seconds": few, "token_seconds": (more - few) / (MORE - FEW)}


def full_prompts(config: AnsweringConfig, batch_size: int) -> Tensors:
    flags = StepConfig(model=config.model, max_seq_len=config.num_tokens + 1, per_device_eval_batch_size=batch_size)
    row = Row(flags.max_seq_len, num_images=1, image_size=IMAGE_SIZE)
    return worst_case_questions(load_processor(config.model), flags, row)


def measured_seconds(accelerator: Accelerator, model: nn.Module, prompts: Tensors, num_tokens: int) -> float:
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


def traced_seconds(config: AnsweringConfig, gpu: str, batch_size: int, num_tokens: int) -> float:
    """What memory/step_time.py makes of the operators that generation runs, on fake tensors."""
    prompts = full_prompts(config, batch_size)  # real
    probe_config = ProbeConfig(model=config.model, mode="predict", gpu=gpu)
    fake_mode = PartlyFakeMode()
    with torch.device("meta"):
        model = load_model(config.model, torch.bfloat16, probe_config.attn_implementation).eval()
    model = fake_model(model, "cpu", fake_mode)
    recorder = Recorder(model, workspaces_of("cuda", probe_config.gpu), BLOCK_BYTES["cuda"])
    with local_accelerator(probe_config) as accelerator, fake_mode, kernels_of("cuda"):
        prompts = {name: tensor.clone() for name, tensor in prompts.items()}  # fake
        with recorder, noted(recorder.record, "cuda"), known_length(num_tokens), accelerator.autocast():
            recorder.work.start()
            recorder.enter_phase("forward")  # where operations are noted
            recorder.answers_items = True  # generation asks after every token which answers have ended
            generate_tokens(model, prompts, num_tokens)
    (operations,) = recorder.work.micro_batches
    return seconds_of(operations, GPUS[probe_config.gpu].speed)


if __name__ == "__main__":
    run_script(main, AnsweringConfig)
