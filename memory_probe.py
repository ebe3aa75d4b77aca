"""Say what memory a training step needs before it runs, or measure it: predict needs no GPU, no weights, no download.

    python memory_probe.py --lora-r 16
    python memory_probe.py --model mgm-7b --gpu rtx3060 --max_seq_len 1024 --explain
    python memory_probe.py --mode both --device cpu --model tiny --max_seq_len 64
    python memory_probe.py --calibrate
    python memory_probe.py --sweep lora_r=0,8,16,32 max_seq_len=1024,2048 strategy=single,zero3 --output results/sweep

The last line on stdout is a JSON object. Exit code 3: it does not fit.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

import torch

from memory.calibrate import calibrate, entry
from memory.charts import step_chart
from memory.explain import explain, suggest
from memory.gpus import GIB, GPUS
from memory.measure import measure
from memory.predict import summarize, trace_step
from memory.report import report
from memory.strategy import Strategy
from memory.sweep import run_sweep
from memory.zero import PlacedTrace
from train import StepConfig, check_positions
from utils import UserError, check_choice, check_minimum, resolve_mixed_precision, run_script


@dataclass(kw_only=True)
class ProbeConfig(StepConfig):
    model: str = field(default="mgm-2b", metadata={"help": "folder, hub id or preset name"})
    images_per_sample: int = field(default=1, metadata={"help": "images in each row of the batch"})
    mode: str | None = field(
        default=None, metadata={"help": "predict | measure | both; default: measure on a GPU, else predict"}
    )
    device: str | None = field(default=None, metadata={"help": "cuda | cpu; predict defaults to cuda"})
    strategy: str = field(default="single", metadata={"help": "single | ddp | zero1 | zero2 | zero3"})
    offload: str = field(default="none", metadata={"help": "none | optimizer | param"})
    world_size: int | None = field(
        default=None, metadata={"help": "processes, on one host; default: as --config_file says, else 1"}
    )
    config_file: str | None = field(
        default=None, metadata={"help": "accelerate_configs/X.yaml: strategy, offload and bucket sizes from there"}
    )
    gpu: str = field(default="rtx4090", metadata={"help": " | ".join(GPUS)})
    budget_gib: float | None = field(default=None, metadata={"help": "instead of the GPU's capacity"})
    sweep: list[str] | None = field(default=None, metadata={"help": "KEY=V1,V2 ...: every combination"})
    output: str | None = field(
        default=None,
        metadata={"help": "folder for the result and a picture of it"},
    )
    explain: bool = field(default=False, metadata={"help": "what to change first, each suggestion traced"})
    calibrate: bool = field(default=False, metadata={"help": "measure memory/gpus.py's constants on this GPU"})

    def __post_init__(self) -> None:
        has_gpu = torch.cuda.is_available()
        self.mode = self.mode or ("measure" if has_gpu else "predict")
        check_choice("mode", self.mode, ("predict", "measure", "both"))
        self.device = self.device or ("cuda" if has_gpu or self.mode == "predict" else "cpu")
        check_choice("device", self.device, ("cuda", "cpu"))
        if self.device == "cuda" and self.mode != "predict" and not has_gpu:
            raise UserError(f"--mode {self.mode} --device cuda: this machine has no GPU; predict, or choose cpu")
        super().__post_init__()
        if self.world_size is not None:
            check_minimum(self, world_size=1)
        if self.sweep is None:  # a sweep's rows are configs of their own
            self.resolve_launch()
        check_choice("gpu", self.gpu, tuple(GPUS))
        check_minimum(self, images_per_sample=0)
        if self.explain and self.mode == "measure":
            raise UserError("--explain: it explains a prediction; choose --mode predict or both")
        if self.budget_gib is not None and not 0 < self.budget_gib < math.inf:  # NaN is neither
            raise UserError(f"--budget_gib {self.budget_gib}: it must be above 0, and finite")

    def resolve_launch(self) -> None:
        """Strategy, offload and number of processes as `config_file` has them; a number that was given wins."""
        if self.config_file is not None:
            launch = Strategy.from_config_file(self.config_file, self.world_size)
            self.strategy, self.offload, self.world_size = launch.name, launch.offload, launch.world_size
        self.world_size = self.world_size or 1

    def resolve_precision(self) -> str:
        """A prediction for a GPU is not bound to what this machine can do: `auto` is then bf16."""
        if self.device == "cuda" and self.mode == "predict":
            return "bf16" if self.mixed_precision == "auto" else self.mixed_precision
        return resolve_mixed_precision(self.mixed_precision)

    @property
    def budget_bytes(self) -> int:
        return GPUS[self.gpu].capacity_bytes if self.budget_gib is None else int(self.budget_gib * GIB)


def main(config: ProbeConfig) -> dict:
    if config.calibrate:
        result = calibrate(config)
        print(entry(result), flush=True)
        return result
    if config.sweep:
        return run_sweep(config, probe)
    result, trace = probe_and_trace(config)
    print(report(result), flush=True)
    if config.explain:
        suggestions = suggest(config, result["device_bytes"])
        result |= suggestions
        print("", *explain(config, trace.device, suggestions), sep="\n", flush=True)
    if config.output is not None:
        write_output(Path(config.output), result, trace)
    return result


def write_output(folder: Path, result: dict, trace: PlacedTrace | None) -> None:
    """The result and, of a prediction, a picture of the step as it goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe.json").write_text(json.dumps(result, indent=1) + "\n")
    if trace is not None:
        step_chart(trace.device).savefig(folder / "step.png", dpi=120)
    print(f"Saved to {folder}", flush=True)


def probe(config: ProbeConfig) -> dict:
    """One configuration's memory: predicted, measured or both, in the contract's keys."""
    return probe_and_trace(config)[0]


def probe_and_trace(config: ProbeConfig) -> tuple[dict, PlacedTrace | None]:
    """What probe returns, and the traced step that a prediction comes from."""
    start = time.monotonic()
    check_positions(config)
    result, trace = {"mode": config.mode, "model": config.model, "config": asdict(config)}, None
    if config.mode != "measure":
        trace = trace_step(config)
        result |= summarize(trace, config)
    if config.mode != "predict":
        measured = measure(config)
        if config.mode == "both":
            result |= compare(result["peak_allocated_bytes"], measured["peak_allocated_bytes"])
            measured = {"measured": measured}
        result |= measured
    result["budget_bytes"] = config.budget_bytes
    result["fits"] = result["device_bytes"] <= config.budget_bytes and result.get("oom") is None
    return result | {"seconds": time.monotonic() - start}, trace


def compare(predicted_bytes: int, measured_bytes: int) -> dict[str, float]:
    return {
        "predicted_peak_allocated_bytes": predicted_bytes,
        "measured_peak_allocated_bytes": measured_bytes,
        "error": predicted_bytes / measured_bytes - 1,
    }


if __name__ == "__main__":
    outcome = run_script(main, ProbeConfig)
    sys.exit(3 if outcome.get("fits") is False else 0)
