"""Time and peak memory of a LoRA step by train.py, by transformers' Trainer with PEFT and by TRL's SFTTrainer:

    pip install -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 python -m benchmarks.step    # no GPU; ten minutes of one core
    python -m benchmarks.step --steps 10 --size gemma-2b --output results/gpu/step.json    # on a GPU, in bf16

The model is a bare language model with random weights: the other trainers have no MGM. All take the same weights,
LoRA, AdamW and row, of which the last part has labels. Each variant has a process of its own. Its first two steps give
the peak; if variants disagree on losses or gradient norms, nothing is reported. Then they take turns, backwards in
every other round; on a GPU also train.py under ZeRO-3 with everything offloaded. Writes results/step.json; the last
line on stdout is JSON.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median

import datasets
import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GemmaConfig, GemmaForCausalLM, Trainer, TrainerCallback, TrainingArguments, get_scheduler

import step
from benchmarks.rows import machine
from child_processes import process_pool
from layers.chunked_loss import IGNORE_INDEX, find_label_positions
from layers.model_loss import use_model_loss
from layers.recompute_activation import recompute_activations
from layers.tiled_mlp import tile_frozen_mlps
from memory.cpu_profile import memory_events, profile_memory, rise, storage_bytes
from memory.launch import launched
from memory.strategy import Strategy
from mgm.configuration_mgm import mgm_2b
from models.config import MIXED_PRECISIONS
from models.loading import load_processor
from models.lora import trained_parameters
from utils import check_choice, check_device, check_minimum, flag, run_script, write_json


PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
SIZES = {
    # Gemma-2B's proportions: an MLP eight times as wide as the hidden states, heads of 256, a tied head.
    "small": lambda: GemmaConfig(
        vocab_size=65536,
        hidden_size=768,
        intermediate_size=6144,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "gemma-2b": lambda: mgm_2b().text_config,
}


@dataclass(kw_only=True)
class StepBenchmarkConfig:
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda | cpu")
    size: str = flag("small", " | ".join(SIZES))
    rounds: int = 5
    steps: int = flag(1, "in each round")
    num_tokens: int = 1024
    label_share: float = flag(0.3, "of the tokens")
    output: str = "results/step.json"

    def __post_init__(self) -> None:
        check_device(self.device)
        check_choice("size", self.size, tuple(SIZES))
        check_minimum(self, rounds=1, steps=1, num_tokens=2, label_share=0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the computation. The trained parameters are in fp32."""
        return MIXED_PRECISIONS[self.mixed_precision]

    @property
    def mixed_precision(self) -> str:
        return "bf16" if self.device == "cuda" else "no"

    @property
    def num_labels(self) -> int:
        return round(self.num_tokens * self.label_share)


@dataclass
class Step:
    seconds: float
    loss: float
    grad_norm: float


class OurLanguageModel(GemmaForCausalLM):
    """A bare language model with the loss that train.py takes."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        use_model_loss(self, chunked=True)


def make_row(config: StepBenchmarkConfig) -> dict[str, list[int]]:
    """A prompt and a reply of random tokens; the reply has the labels."""
    vocab_size = SIZES[config.size]().vocab_size
    input_ids = torch.randint(vocab_size, (config.num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    num_prompt = config.num_tokens - config.num_labels
    return {"input_ids": input_ids, "labels": [IGNORE_INDEX] * num_prompt + input_ids[num_prompt:]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def build_peft_model(model_class: type[GemmaForCausalLM], config: StepBenchmarkConfig) -> PeftModel:
    """Frozen random weights, the same for every class, and the LoRA of train.py without dropout, so that losses agree.
    B is random too: with B zero, as LoRA begins, half of the gradients would be zero."""
    torch.manual_seed(0)
    with torch.device(config.device):
        model = model_class._from_config(SIZES[config.size](), dtype=config.dtype, attn_implementation="sdpa")
    flags = step.StepConfig()
    lora = LoraConfig(r=flags.lora_r, lora_alpha=flags.lora_alpha, target_modules=flags.lora_target_modules)
    model = get_peft_model(model, lora)
    torch.manual_seed(0)
    for parameter in trained_parameters(model):
        parameter.data = torch.randn(parameter.shape).mul(0.02).to(config.device)
    return model.train()


class Ours:
    """step.training_step on the model as step.build_model would make it."""

    def __init__(self, config: StepBenchmarkConfig, gradient_checkpointing: bool) -> None:
        flags = step.StepConfig(mixed_precision=config.mixed_precision, per_device_train_batch_size=1)
        # Before the accelerator: under ZeRO-3 the model would draw other weights.
        model = build_peft_model(OurLanguageModel, config)
        self.accelerator = step.build_accelerator(
            flags.mixed_precision, flags.per_device_train_batch_size, max_grad_norm=flags.max_grad_norm
        )
        if self.accelerator.state.deepspeed_plugin is not None:
            model.to(config.dtype)  # the engine has fp32 masters of its own
        if gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        tile_frozen_mlps(model, flags.mlp_tiles)
        recompute_activations(model)
        optimizer = step.build_optimizer(model, "adamw_torch", LEARNING_RATE)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = get_scheduler("constant", self.optimizer)
        batch = collate([make_row(config)])
        batch["label_positions"] = find_label_positions(batch["labels"])
        self.batch = {name: tensor.to(config.device) for name, tensor in batch.items()}
        self.num_items_in_batch = len(batch["label_positions"])

    def run(self, num_steps: int) -> list[Step]:
        steps = []
        for _ in range(num_steps):
            start = clock()
            with self.accelerator.accumulate(self.model):
                loss, grad_norm = step.training_step(
                    self.accelerator,
                    self.model,
                    self.optimizer,
                    self.scheduler,
                    self.batch,
                    num_items_in_batch=self.num_items_in_batch,
                    max_grad_norm=MAX_GRAD_NORM,
                )
            steps.append(Step(clock() - start, loss.item(), float(grad_norm)))
        return steps


class OursUnderZero3(Ours):
    """The same under ZeRO-3, with weights and optimizer state in host memory."""

    def __init__(self, config: StepBenchmarkConfig, gradient_checkpointing: bool) -> None:
        strategy = Strategy.from_config_file("accelerate_configs/zero3.yaml")
        self.environment = ExitStack()  # stays open: DeepSpeed reads the environment in every step
        self.environment.enter_context(launched(strategy.deepspeed_config, gpu=config.device == "cuda"))
        super().__init__(config, gradient_checkpointing)
        clear_device_cache()  # the model was built unsharded on the device


class StepTimer(TrainerCallback):
    """Seconds of each step, without loading its batch before and logging after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.start = clock()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(clock() - self.start)


class Baseline:
    """transformers' Trainer or a subclass, set up as its documentation does."""

    def __init__(
        self, make_trainer: Callable[..., Trainer], config: StepBenchmarkConfig, gradient_checkpointing: bool
    ) -> None:
        self.model = build_peft_model(GemmaForCausalLM, config)
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = make_trainer(
            self.model,
            {
                "output_dir": self.folder.name,
                "per_device_train_batch_size": 1,
                "learning_rate": LEARNING_RATE,
                "max_grad_norm": MAX_GRAD_NORM,
                "optim": "adamw_torch",
                "weight_decay": 0.0,
                "lr_scheduler_type": "constant",
                "gradient_checkpointing": gradient_checkpointing,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
                "use_cpu": config.device == "cpu",
                "bf16": config.device == "cuda",
                "max_steps": 1,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            },
            datasets.Dataset.from_list([make_row(config)]),
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.timer = StepTimer()
        self.trainer.add_callback(self.timer)

    def run(self, num_steps: int) -> list[Step]:
        self.timer.seconds.clear()
        self.trainer.args.max_steps = num_steps
        self.trainer.train()
        logs = [log for log in self.trainer.state.log_history if "grad_norm" in log]
        return [
            Step(seconds, log["loss"], log["grad_norm"]) for seconds, log in zip(self.timer.seconds, logs, strict=True)
        ]


def make_trainer(model: PeftModel, arguments: dict, dataset: datasets.Dataset) -> Trainer:
    return Trainer(model, TrainingArguments(**arguments), train_dataset=dataset, data_collator=collate)


def make_sft_trainer(model: PeftModel, arguments: dict, dataset: datasets.Dataset) -> Trainer:
    from trl import SFTConfig, SFTTrainer  # nothing else needs it: it is in benchmarks/requirements.txt alone

    arguments = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
    tokenizer = load_processor("data/tiny_mgm").tokenizer  # required, although the row is tokenized already
    return SFTTrainer(model, arguments, train_dataset=dataset, data_collator=collate, processing_class=tokenizer)


ZERO3 = "train.py under ZeRO-3, all offloaded"  # on a GPU alone, with checkpointing
KINDS: dict[str, Callable[[StepBenchmarkConfig, bool], Ours | Baseline]] = {
    "train.py": Ours,
    "transformers Trainer + PEFT": lambda *settings: Baseline(make_trainer, *settings),
    "TRL SFTTrainer": lambda *settings: Baseline(make_sft_trainer, *settings),
    ZERO3: OursUnderZero3,
}
Variant = tuple[str, bool]  # a kind, with or without checkpointing
VARIANTS = [(kind, checkpointing) for checkpointing in (True, False) for kind in KINDS if kind != ZERO3]


def clock() -> float:
    """Seconds: of the clock on a GPU, of this process's processor time on a CPU, which other programs may use too."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main(config: StepBenchmarkConfig) -> dict:
    variants = [*VARIANTS, (ZERO3, True)] if config.device == "cuda" else VARIANTS
    with ExitStack() as stack:
        pools = {variant: stack.enter_context(process_pool()) for variant in variants}
        first = {variant: pool.submit(build, config, *variant).result() for variant, pool in pools.items()}
        check_agreement({variant: steps for variant, (steps, _) in first.items()})
        steps = take_turns(config, pools)
    flops, rate = step_flops(config), matmul_flops_per_second(config)
    rows = []
    for kind, checkpointing in variants:
        taken = steps[kind, checkpointing]
        seconds = median(step.seconds for step in taken)
        row = {"kind": kind, "gradient_checkpointing": checkpointing}
        row |= {"seconds": [round(step.seconds, 4) for step in taken], "median_seconds": seconds}
        row |= {"tokens_per_second": config.num_tokens / seconds, "share_of_matmul_rate": flops / seconds / rate}
        row |= {"peak_bytes": first[kind, checkpointing][1], "losses": [step.loss for step in taken]}
        rows.append(row | {"grad_norms": [step.grad_norm for step in taken]})
    result = {"benchmark": "step", **asdict(config), **environment(config), "matmul_flops_per_second": rate}
    result |= {"step_flops": flops, "rows": rows, "ratios": ratios(rows)}
    write_json(config.output, result)
    return result


def build(config: StepBenchmarkConfig, kind: str, gradient_checkpointing: bool) -> tuple[list[Step], int]:
    """Build this process's variant. Returns its first two steps and their peak in bytes, weights included."""
    global variant
    variant = KINDS[kind](config, gradient_checkpointing)
    if config.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return variant.run(2), torch.cuda.max_memory_allocated()
    resident_bytes = storage_bytes([*variant.model.parameters(), *variant.model.buffers()])
    with profile_memory() as profiler:
        steps = variant.run(2)
    return steps, resident_bytes + rise(memory_events(profiler))


def take_turn(num_steps: int) -> list[Step]:
    """Runs in a variant's process, after `build`."""
    gc.collect()
    return variant.run(num_steps)


def take_turns(config: StepBenchmarkConfig, pools: dict[Variant, ProcessPoolExecutor]) -> dict[Variant, list[Step]]:
    """The steps of all rounds."""
    steps: dict[Variant, list[Step]] = {variant: [] for variant in pools}
    for number in range(config.rounds):
        for variant in steps if number % 2 == 0 else reversed(steps):
            steps[variant] += pools[variant].submit(take_turn, config.steps).result()
        print(f"round {number + 1} of {config.rounds}", flush=True)
    return steps


def check_agreement(steps: dict[Variant, list[Step]]) -> None:
    """Raise ValueError unless all variants have the same loss and gradient norm in both of their first steps."""
    tolerance = 3e-2 if torch.cuda.is_available() else 1e-4  # bf16 or fp32
    expected = steps[VARIANTS[0]]
    for variant, found in steps.items():
        for a, b in zip(expected, found, strict=True):
            for name in ("loss", "grad_norm"):
                x, y = getattr(a, name), getattr(b, name)
                if abs(x - y) > tolerance * abs(x):
                    raise ValueError(f"{name} of {variant} is {y}, of {VARIANTS[0]} {x}: the steps differ")


def ratios(rows: list[dict]) -> list[dict]:
    """train.py against the better baseline with and without checkpointing, and against the lowest peak of all."""
    baselines = [row for row in rows if not row["kind"].startswith("train.py")]
    lowest_peak = min(row["peak_bytes"] for row in baselines)
    found = []
    for ours in (row for row in rows if row["kind"] == "train.py"):
        entry = {"gradient_checkpointing": ours["gradient_checkpointing"]}
        for checkpointing, name in ((True, "with"), (False, "without")):
            rivals = [row for row in baselines if row["gradient_checkpointing"] == checkpointing]
            fastest = max(row["tokens_per_second"] for row in rivals)
            entry[f"speed_against_{name}_checkpointing"] = ours["tokens_per_second"] / fastest
            entry[f"peak_against_{name}_checkpointing"] = ours["peak_bytes"] / min(row["peak_bytes"] for row in rivals)
        found.append(entry | {"peak_against_lowest": ours["peak_bytes"] / lowest_peak})
    return found


def step_flops(config: StepBenchmarkConfig) -> int:
    """The operations that a step needs: forward, backward to the inputs of frozen matrices, the head for labels alone.

    Causal attention takes half of the square, and twice as much backward as forward. LoRA's matrices are left out.
    """
    model = SIZES[config.size]()
    attention_size = model.num_attention_heads * model.head_dim
    matrices = model.hidden_size * (2 * attention_size + 2 * model.num_key_value_heads * model.head_dim)
    matrices += 3 * model.hidden_size * model.intermediate_size
    attention = 3 * 2 * config.num_tokens**2 * attention_size
    head = 4 * config.num_labels * model.hidden_size * model.vocab_size
    return model.num_hidden_layers * (4 * config.num_tokens * matrices + attention) + head


def matmul_flops_per_second(config: StepBenchmarkConfig) -> float:
    """The rate at which two large square matrices are multiplied, the best of ten."""
    size = 8192 if config.device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=config.device, dtype=config.dtype) for _ in range(2))
    seconds = []
    for _ in range(11):
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds[1:])


def environment(config: StepBenchmarkConfig) -> dict:
    """The machine and the model that figures hold for."""
    cores = f"{os.cpu_count()} cores, PyTorch on {torch.get_num_threads()}"
    with torch.device("meta"):
        model = GemmaForCausalLM(SIZES[config.size]())
    return machine(*PACKAGES) | {
        "machine": torch.cuda.get_device_name() if config.device == "cuda" else cores,
        "dtype": str(config.dtype).removeprefix("torch."),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    run_script(main, StepBenchmarkConfig)
