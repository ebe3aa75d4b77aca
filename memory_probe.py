"""Say what memory a training step needs before it runs, or measure it: predict needs no GPU, no weights, no download.

    python memory_probe.py --lora-r 16
    python memory_probe.py --model mgm-7b --gpu rtx3060 --max_seq_len 1024 --explain
    python memory_probe.py --mode both --device cpu --model tiny --max_seq_len 64
    python memory_probe.py --calibrate
    python memory_probe.py --plan --gpu rtx3060 --lock gradient_accumulation_steps=128 --output results/plan
    python memory_probe.py --sweep lora_r=0,8,16,32 max_seq_len=1024,2048 strategy=single,zero3 --output outputs/sweep

The last line on stdout is a JSON object. Exit code 3: it does not fit, or no plan does.
"""

from pathlib import Path

import quiet  # noqa: F401 (before PEFT)

from memory.calibrate import calibrate, entry
from memory.charts import step_chart
from memory.config import ProbeConfig
from memory.explain import explain, suggest
from memory.page import step_page
from memory.placed import PlacedRecord
from memory.probe import probe_with_record
from memory.report import report
from memory.snapshot import snapshot_bytes
from memory.sweep import run_sweep
from planning.config import PlanConfig
from planning.plan import run_plan
from utils import check_writable, run_script, write_json, write_whole


def main(config: PlanConfig) -> dict:
    if config.output is not None:
        check_writable("output", Path(config.output))
    if config.plan:
        return run_plan(config)
    return run_probe(config.probe_config)


def run_probe(config: ProbeConfig) -> dict:
    if config.calibrate:
        result = calibrate(config)
        print(entry(result), flush=True)
        return result
    if config.sweep:
        return run_sweep(config)
    result, record = probe_with_record(config)
    print(report(result), flush=True)
    if config.explain:
        suggestions = suggest(config, result["device_bytes"])
        result |= suggestions
        print("", *explain(config, record.device, suggestions), sep="\n", flush=True)
    if config.output is not None:
        write_output(Path(config.output), result, record)
    return result


def write_output(folder: Path, result: dict, record: PlacedRecord | None) -> None:
    """The result and, of a prediction, the step as it goes on: a picture, a page, and of a GPU a memory snapshot."""
    write_json(folder / "probe.json", result)
    if record is not None:
        step_chart(record.device).savefig(folder / "step.png", dpi=120)
        write_whole(folder / "step.html", step_page(result, record.device).encode())
        if result["config"]["device"] == "cuda":
            write_whole(folder / "snapshot.pickle", snapshot_bytes(record.device))
    print(f"Saved to {folder}", flush=True)


if __name__ == "__main__":
    run_script(main, PlanConfig, exit_code=lambda result: 3 if result.get("fits") is False else 0)
