"""What the README's first command reaches on the demo, with one process and with two: results/demo.json.

    python -m benchmarks.demo    # no GPU; six minutes on two cores

It trains as the README says, answers held-out questions before and after, and in the end `eval.py` asks all of them.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import ROOT, machine, run_quietly
from utils import flag, run_script, write_json


LAUNCH = "accelerate launch --config_file accelerate_configs/zero3.yaml"
NUM_PROCESSES = (1, 2)


@dataclass(kw_only=True)
class DemoConfig:
    output: str = flag("results/demo.json", "file to write")


def main(config: DemoConfig) -> dict[str, Any]:
    runs = [run_demo(number) for number in NUM_PROCESSES]
    result = {**machine("torch", "transformers", "peft", "deepspeed"), "runs": runs}
    write_json(config.output, result)
    return result


def run_demo(num_processes: int) -> dict[str, Any]:
    """Shares of exact answers: of the questions that the run asks before and after, and of all after it."""
    with tempfile.TemporaryDirectory() as folder:
        adapter, scores = Path(folder) / "adapter", Path(folder) / "scores.json"
        train = f"{LAUNCH} --num_processes {num_processes} train.py --output_dir {adapter}"
        for command in (train, f"python eval.py --adapter {adapter} --output {scores}"):
            run_quietly(command.split(), command, ROOT)
        trained, scored = (json.loads(path.read_text()) for path in (adapter / "run.json", scores))
    found = trained["eval"]
    return {
        "num_processes": num_processes,
        "asked": {name: found[name] for name in ("n", "exact_match_before", "exact_match")},
        "all": {"n": scored["n"], "exact_match": scored["score"]},
    }


if __name__ == "__main__":
    run_script(main, DemoConfig)
