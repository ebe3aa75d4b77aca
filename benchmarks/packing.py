"""How many more samples a second train.py trains on with --packing than with padded batches of the same memory:

    OMP_NUM_THREADS=1 python -m benchmarks.packing    # no GPU; about five minutes of one core

Memory follows from the positions of the largest micro-batch, and all variants may have as many. A padded batch holds
as many samples as would fit if each were the longest. Padded batches are shuffled; or sorted inside an update, as by
train.py; or grouped by length, as by --group_by_length. Samples, model and step are the same, and so must be the loss.

The samples are the demo's, of 36 to 39 tokens, and conversations joined from them, whose lengths are as skewed as in
real data. Batches are made before the clock starts. Variants take turns, backwards in every other round.
Writes results/packing.json; the last line on stdout is JSON.
"""

from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin, get_scheduler

import step
from benchmarks.loader import PACKAGES
from benchmarks.rows import machine
from benchmarks.step_watch import clock
from data.batching import TrainCollator, UpdateBatchSampler
from data.dataset import ConversationDataset, open_dataset
from data.demo import ensure_demo
from data.packing import PackedCollator, PackedDataset, pack
from models.loading import load_processor
from utils import check_minimum, flag, run_script, write_json


MODEL = "data/tiny_mgm"
ACCUMULATION = 8  # micro-batches whose samples train.py sorts by length before it cuts them
Batches = list[dict[str, torch.Tensor]]


@dataclass(kw_only=True)
class PackingConfig:
    num_samples: int = 256
    max_seq_len: int = flag(256, "tokens of a packed row; no sample is longer")
    rows: int = flag(4, "of a packed micro-batch")
    rounds: int = 5
    output: str = "results/packing.json"

    def __post_init__(self) -> None:
        check_minimum(self, num_samples=1, max_seq_len=64, rows=1, rounds=1)


def main(config: PackingConfig) -> dict:
    processor = load_processor(MODEL)
    demo = open_dataset(ensure_demo() / "train.json")
    cases = {
        "demo": [demo[index] for index in range(config.num_samples)],
        "conversations": joined(demo, processor, config),
    }
    results = {name: compare(samples, processor, config) for name, samples in cases.items()}
    result = {"benchmark": "packing", **asdict(config), **machine(*PACKAGES), "cases": results}
    write_json(config.output, result)
    return result


def joined(demo: ConversationDataset, processor: ProcessorMixin, config: PackingConfig) -> list[dict]:
    """Conversations made of the demo's exchanges, each about its own image. The number of exchanges is drawn from a
    log-normal distribution, which is close to that of real conversations."""
    generator = np.random.default_rng(0)
    indices = iter(range(len(demo)))
    samples: list[dict] = []
    while len(samples) < config.num_samples:
        sample: dict = {"conversations": [], "images": []}
        for _ in range(1 + int(generator.lognormal(0.5, 1.0))):
            exchange = demo[next(indices)]
            longer = {name: sample[name] + exchange[name] for name in sample}
            if len(processor.tokenize(longer["conversations"])[0]) > config.max_seq_len:
                break
            sample = longer
        samples.append(sample)
    return samples


def compare(samples: list[dict], processor: ProcessorMixin, config: PackingConfig) -> dict:
    """Each variant's seconds for all samples, round by round, and how much faster packed rows are than it."""
    encoded = [processor.tokenize(sample["conversations"]) for sample in samples]
    num_tokens = np.array([len(input_ids) for input_ids, _ in encoded])
    num_label_tokens = np.array([sum(label >= 0 for label in labels[1:]) for _, labels in encoded])
    batch_size = config.rows * config.max_seq_len // num_tokens.max()
    settings = num_label_tokens, batch_size, ACCUMULATION, 1, 0
    variants = {
        "shuffled": padded(samples, num_tokens, processor, UpdateBatchSampler(*settings)),
        "sorted": padded(samples, num_tokens, processor, UpdateBatchSampler(*settings, num_tokens)),
        "grouped": padded(samples, num_tokens, processor, UpdateBatchSampler(*settings, num_tokens, True)),
        "packed": packed(samples, num_tokens, processor, config),
    }
    steps = Steps(int(num_label_tokens.sum()))
    losses = {name: steps.run(batches)[1] for name, batches in variants.items()}  # also warms up
    if max(losses.values()) - min(losses.values()) > 1e-4 * losses["packed"]:
        raise ValueError(f"the variants do not train on the same samples: their losses are {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(config.rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(steps.run(variants[name])[0])
    rows = {name: describe(variants[name], num_tokens, seconds[name]) for name in variants}
    lengths = {"shortest": int(num_tokens.min()), "mean": float(num_tokens.mean()), "longest": int(num_tokens.max())}
    return {
        "lengths": lengths,
        "padded_batch_size": int(batch_size),
        "losses": losses,
        "variants": rows,
        "speedup_of_packing": {
            name: rows["packed"]["samples_per_second"] / row["samples_per_second"] for name, row in rows.items()
        },
    }


def padded(
    samples: list[dict], num_tokens: np.ndarray, processor: ProcessorMixin, sampler: UpdateBatchSampler
) -> Batches:
    collate = TrainCollator(processor, int(num_tokens.max()))
    return [collate([samples[index] for index in micro_batch]) for micro_batch in sampler]


def packed(samples: list[dict], num_tokens: np.ndarray, processor: ProcessorMixin, config: PackingConfig) -> Batches:
    packing = pack(num_tokens, config.max_seq_len, 0)
    rows = PackedDataset(samples, packing)
    row_tokens = packing.sums(num_tokens)
    sampler = UpdateBatchSampler(row_tokens, config.rows, ACCUMULATION, 1, 0, row_tokens)
    collate = PackedCollator(processor, config.max_seq_len)
    return [collate([rows[row] for row in micro_batch]) for micro_batch in sampler]


class Steps:
    """step.training_step on batches, with a learning rate of 0: all variants see the same weights."""

    def __init__(self, num_label_tokens: int) -> None:
        self.num_label_tokens = num_label_tokens
        flags = step.StepConfig(model=MODEL, lora_dropout=0.0)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=flags.mixed_precision)
        model = step.build_model(flags, is_deepspeed=False).train()
        optimizer = step.build_optimizer(model, flags.optim, learning_rate=0.0)
        self.model: nn.Module
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = get_scheduler("constant", self.optimizer)

    def run(self, batches: Batches) -> tuple[float, float]:
        """Seconds for all batches, and the mean loss over the label tokens of all."""
        losses = []
        start = clock()
        for batch in batches:
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with self.accelerator.accumulate(self.model):
                loss, _ = step.training_step(
                    self.accelerator,
                    self.model,
                    self.optimizer,
                    self.scheduler,
                    batch,
                    num_items_in_batch=self.num_label_tokens,
                    max_grad_norm=1.0,
                )
                losses.append(loss)
        seconds = clock() - start
        return seconds, torch.stack(losses).sum().item()


def describe(batches: Batches, num_tokens: np.ndarray, seconds: list[float]) -> dict:
    positions = sum(batch["input_ids"].numel() for batch in batches)
    return {
        "micro_batches": len(batches),
        "positions": positions,
        "padding_share": 1 - float(num_tokens.sum()) / positions,
        "seconds": [round(value, 3) for value in seconds],
        "samples_per_second": len(num_tokens) / median(seconds),
    }


if __name__ == "__main__":
    run_script(main, PackingConfig)
