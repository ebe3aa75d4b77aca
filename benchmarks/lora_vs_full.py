"""How much of full fine-tuning's accuracy LoRA and the projector alone keep, with their memory and time, on the demo.

    python -m benchmarks.lora_vs_full --jobs 16       # no GPU; 31 runs, each five minutes of one core
    python -m benchmarks.lora_vs_full --peaks true    # two minutes: the memory alone, of the runs that are there
    python -m benchmarks.lora_vs_full_report          # the tables and the picture of docs/lora_vs_full.md

First a search, with one seed, for each method's learning rate; then the other seeds with the best rate. A run trains,
answers the held-out questions, and writes a file in results/lora_vs_full/; runs that have a file are skipped.
"""

import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.rows import ROOT, commit
from child_processes import run_child
from data.demo import ensure_demo
from data.lengths import column_values
from models.loading import load_processor
from train import DEMO_RECIPE, TrainConfig, build_datasets
from utils import check_minimum, flag, run_script, write_json


METHODS: dict[str, list[str]] = {
    "full": ["--lora_r", "0"],
    "lora-r8": ["--lora_r", "8", "--lora_alpha", "16"],  # alpha / r stays at 2, as in the recipe
    "lora-r16": ["--lora_r", "16", "--lora_alpha", "32"],
    "lora-r32": ["--lora_r", "32", "--lora_alpha", "64"],
    "all-linear-r16": ["--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear"],
    "projector": ["--lora_r", "0", "--trainable_modules", "multi_modal_projector"],
}
LABELS = {
    "full": "full fine-tuning",
    "lora-r8": "LoRA r=8, q v o",
    "lora-r16": "LoRA r=16, q v o",
    "lora-r32": "LoRA r=32, q v o",
    "all-linear-r16": "LoRA r=16, all linear",
    "projector": "projector alone",
}
# Learning rates to try. Full fine-tuning has the most candidates: the others are compared with it.
SEARCH = {
    "full": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
    "lora-r16": [1e-3, 2e-3, 4e-3, 8e-3],
    "all-linear-r16": [1e-3, 2e-3, 4e-3, 8e-3],
    "projector": [2e-3, 4e-3, 8e-3],
}
SEARCHED_BY = {"lora-r8": "lora-r16", "lora-r32": "lora-r16"}  # take the rate of another method
SEEDS = (1, 2, 3)  # the search uses the first
BASE = "base"  # the tiny model, not trained


@dataclass(kw_only=True)
class ExperimentConfig:
    jobs: int = flag(1, "runs at a time, one thread each")
    output: str = "results/lora_vs_full"
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": " | ".join(METHODS)})
    max_steps: int = flag(-1, "updates a run; -1: an epoch, which the report needs")
    peaks: bool = flag(False, "train nothing: measure the step's memory again, after the step has changed")

    def __post_init__(self) -> None:
        check_minimum(self, jobs=1, max_steps=-1)


@dataclass(frozen=True)
class Run:
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return self.method if self.method == BASE else f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


def main(config: ExperimentConfig) -> dict[str, Any]:
    folder = Path(config.output)
    longest = prepare_demo()
    if config.peaks:
        return {"runs": measure_peaks(folder, longest), "output": config.output}
    searching = [method for method in SEARCH if method in config.methods]
    wanted = [Run(BASE, 0.0, 0)] + [Run(method, rate, SEEDS[0]) for method in searching for rate in SEARCH[method]]
    run_all(config, wanted, longest)
    chosen = choose_rates(folder)
    wanted = [Run(method, chosen[method], seed) for method in config.methods if method in chosen for seed in SEEDS]
    run_all(config, wanted, longest)
    return {"runs": len(list(folder.glob("*.json"))), "learning_rates": chosen, "output": config.output}


def measure_peaks(folder: Path, longest: int) -> int:
    """Measure the step's memory for the runs of a folder. Returns how many there are."""
    peaks = {method: measure_peak(method, longest) for method in METHODS}
    paths = [path for path in folder.glob("*.json") if path.stem != BASE]
    for path in paths:
        result = json.loads(path.read_text())
        write_json(path, result | peaks[result["method"]], indent=None)
    return len(paths)


def prepare_demo() -> int:
    """Write the demo and its cache, before many processes need them at once. Returns its longest sample's tokens."""
    ensure_demo()
    config = TrainConfig(eval_samples=0)
    train_dataset, _ = build_datasets(config, load_processor(config.model))
    return int(column_values(train_dataset.records, "num_tokens").max())


def choose_rates(folder: Path) -> dict[str, float]:
    """The learning rate with the highest held-out score, for each method with results."""
    chosen = {}
    for method, rates in SEARCH.items():
        paths = {rate: Run(method, rate, SEEDS[0]).path(folder) for rate in rates}
        if scores := {rate: json.loads(path.read_text())["score"] for rate, path in paths.items() if path.exists()}:
            chosen[method] = max(scores, key=scores.get)
    return chosen | {method: chosen[other] for method, other in SEARCHED_BY.items() if other in chosen}


def run_all(config: ExperimentConfig, runs: list[Run], longest: int) -> None:
    """Execute the runs without a result, `jobs` at a time. Raises RuntimeError at the end if one has failed."""
    folder = Path(config.output)
    missing = [run for run in runs if not run.path(folder).exists()]
    failed = []
    with ThreadPoolExecutor(max_workers=config.jobs) as pool:
        futures = {pool.submit(execute, run, config, longest): run for run in missing}
        for done, future in enumerate(as_completed(futures), start=1):
            run = futures[future]
            try:
                result = future.result()
            except subprocess.CalledProcessError as error:
                failed.append(run.name)
                print(f"{run.name} failed: {' '.join(error.cmd)}\n{error.stderr[-2000:]}", flush=True)
                continue
            write_json(run.path(folder), result, indent=None)
            print(f"{done}/{len(missing)} {run.name}: {result['score']:.3f}, {result['seconds']:.0f} s", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {', '.join(failed)}; start again to repeat them")


def execute(run: Run, config: ExperimentConfig, longest: int) -> dict[str, Any]:
    """Train, measure the step's memory and answer the held-out questions, with the scripts that a user runs."""
    start = time.perf_counter()
    result = {"method": run.method, "learning_rate": run.learning_rate, "seed": run.seed}
    with tempfile.TemporaryDirectory(prefix="lora_vs_full-") as folder:
        model, output = Path(folder) / "model", Path(folder) / "eval.json"
        flags = ["--output", str(output), "--dataloader_num_workers", "0", "--max_new_tokens", "16"]
        if run.method != BASE:
            result |= train(run, config, model) | measure_peak(run.method, longest)
            is_adapter = (model / "adapter_config.json").exists()
            flags += ["--adapter" if is_adapter else "--model", str(model)]
        script("eval.py", *flags)
        scored = json.loads(output.read_text())
    result |= {"score": scored["score"], "n": scored["n"], "by_type": scored["by_type"]}
    # One character per question, in the data set's order: runs are compared question by question.
    result["exact"] = "".join(str(int(item["value"])) for item in scored["scores"])
    result["types"] = "".join(item["type"][0] for item in scored["scores"])
    return result | {"seconds": time.perf_counter() - start}


def train(run: Run, config: ExperimentConfig, output_dir: Path) -> dict[str, Any]:
    flags = ["--learning_rate", str(run.learning_rate), "--seed", str(run.seed), "--output_dir", str(output_dir)]
    flags += ["--eval_samples", "0", "--dataloader_num_workers", "0", "--max_steps", str(config.max_steps)]
    result = script("train.py", *METHODS[run.method], *flags)
    names = ("global_step", "train_loss", "trainable_params", "total_params", "samples_per_second", "environment")
    return {name: result[name] for name in names} | {"train_peak_rss_bytes": result["peak"]["train"]}


def measure_peak(method: str, longest: int) -> dict[str, Any]:
    """The peak bytes of tensors in a step whose rows are as long as the demo's longest sample; PyTorch and commit."""
    flags = ["--mode", "measure", "--device", "cpu", "--model", TrainConfig.model, "--max_seq_len", str(longest)]
    rows = yaml.safe_load(DEMO_RECIPE.read_text())["per_device_train_batch_size"]
    flags += ["--per_device_train_batch_size", str(rows)]
    result = script("memory_probe.py", *METHODS[method], *flags)
    about = {"probed_tokens": longest, "probed_with": {"torch": torch.__version__, "commit": commit()}}
    return {"peak_allocated_bytes": result["peak_allocated_bytes"]} | about


def script(name: str, *flags: str) -> dict[str, Any]:
    """Run a script on the CPU with one thread. Returns the object on its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = run_child([name, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_script(main, ExperimentConfig)
