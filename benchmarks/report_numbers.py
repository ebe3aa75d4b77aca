"""The numbers of docs/report.md, each by its name, and what each picture was measured with: all from results/.

A document holds `<!-- NAME -->...<!-- /NAME -->` in the middle of a sentence, of any language.
"""

import re
from statistics import fmean, median
from typing import Any

from benchmarks.lora_vs_full_report import RESULTS as LORA_RUNS
from benchmarks.lora_vs_full_report import read_runs, retentions
from benchmarks.memory_tables import gib
from benchmarks.pairs import CPU_FILES, GPU_FILES, Pair, cpu_pairs, gpu_pairs
from benchmarks.plan_tables import BUSY, PLANS, turn_ratios
from benchmarks.rows import read_result
from benchmarks.tables import DEFAULTS
from utils import GIB, MIB


MARKER = re.compile(r"<!-- ([\w-]+) -->(.*?)<!-- /\1 -->", re.S)
LOGITS = (1024, 256_000, 2)  # tokens, vocabulary entries, bytes of a number: of the error that the report begins with
ZERO3 = "accelerate_configs/zero3.yaml"
RIVALS = {"busy-plain": ("Trainer + PEFT", "TRL SFTTrainer"), "busy-liger": ("TRL SFTTrainer, Liger",)}


def with_numbers(text: str) -> str:
    """The text with the numbers between its markers as they are now.

    Raises:
        KeyError: a marker with a name that is not known.
    """
    numbers = report_numbers()
    return MARKER.sub(lambda found: f"<!-- {found[1]} -->{numbers[found[1]]}<!-- /{found[1]} -->", text)


def report_numbers() -> dict[str, str]:
    parts = (memory_numbers(), prediction_numbers(), speed_numbers(), lora_numbers(), planner_numbers(), sources())
    return {name: number for part in parts for name, number in part.items()}


def memory_numbers() -> dict[str, str]:
    tokens, entries, nbytes = LOGITS
    ladder = read_result("ladder.json")
    (with_logits,) = (row for row in ladder["rungs"] if row["title"] == "LoRA r=16")
    same_step = measured({"config_file": ZERO3, "max_seq_len": tokens})
    return {
        "tokens": f"{tokens}",
        "entries": f"{entries:,}",
        "logits": f"{tokens * entries * nbytes / MIB:.2f} MiB",
        "same-step": gib(same_step["device_bytes"]),
        "same-step-host": gib(same_step["host_bytes"]),
        "lora-step": gib(measured(DEFAULTS)["device_bytes"]),
        "full-step": gib(measured(DEFAULTS | {"lora_r": 0})["device_bytes"]),
        "ladder-first": gib(ladder["rungs"][0]["peak_allocated_bytes"]),
        "ladder-last": gib(ladder["rungs"][-1]["peak_allocated_bytes"]),
        "with-logits": gib(with_logits["peak_allocated_bytes"]),
        "of-logits": gib(with_logits["breakdown"]["loss"]),
    }


def measured(flags: dict[str, Any]) -> dict[str, Any]:
    """What the H200 said of these flags."""
    (row,) = (row for row in read_result("gpu/matrix.json")["rows"] if DEFAULTS | row["flags"] == DEFAULTS | flags)
    return row["measured"]


def prediction_numbers() -> dict[str, str]:
    gpu, cpu = list(gpu_pairs()), list(cpu_pairs())
    easy = [pair for pair in gpu if not pair.difficulty]
    (oom,) = (row for row in read_result("gpu/matrix.json")["rows"] if row["measured"].get("oom"))
    seconds = read_result("gpu/step_time.json")["held_out"]["step_seconds"]
    return {
        "gpu-rows": f"{len(gpu)}",
        "gpu-median": f"{median_error(gpu):.2%}",
        "gpu-worst": f"{worst_error(gpu):.1%}",
        "easy-rows": f"{len(easy)}",
        "easy-median": f"{median_error(easy):.2%}",
        "easy-worst": f"{worst_error(easy):.1%}",
        "cpu-rows": f"{len(cpu)}",
        "cpu-worst": f"{worst_error(cpu):.2%}",
        "oom-budget": f"{oom['flags']['budget_gib']} GiB",
        "time-rows": f"{seconds['rows']}",
        "time-median": f"{seconds['median_error']:.0%}",
        "time-worst": f"{seconds['worst_error']:.0%}",
    }


def median_error(pairs: list[Pair]) -> float:
    return median(abs(pair.error) for pair in pairs)


def worst_error(pairs: list[Pair]) -> float:
    return max(abs(pair.error) for pair in pairs)


def speed_numbers() -> dict[str, str]:
    step = read_result("gpu/step.json")
    numbers = {"settings": f"{len(step['ratios'])}"}
    for name, key in (("speed", "speed_against_best"), ("peak", "peak_against_best")):
        numbers |= ends(name, [row[key] for row in step["ratios"]])
    for name, rivals in RIVALS.items():
        numbers |= ends(name, [ratio for rival in rivals for ratio in busy_ratios(step, rival)])
    return numbers


def busy_ratios(step: dict[str, Any], rival: str) -> list[float]:
    """In each setting how long train.py keeps the GPU busy, against another trainer."""
    busy: dict[str, dict[str, float]] = {"train.py": {}, rival: {}}
    for row in step["rows"]:
        flags = dict(row["flags"])
        kind = flags.pop("kind")
        if kind in busy and "failed" not in row:
            busy[kind][str(flags)] = row["activity"][BUSY]
    return [busy["train.py"][setting] / seconds for setting, seconds in busy[rival].items()]


def ends(name: str, values: list[float]) -> dict[str, str]:
    """The lowest and the highest."""
    return {f"{name}-low": f"{min(values):.2f}", f"{name}-high": f"{max(values):.2f}"}


def lora_numbers() -> dict[str, str]:
    base, methods = read_runs(LORA_RUNS)
    lora = retentions()["lora-r16"]
    (row,) = (row for row in read_result("mgm_2b.json")["lora"] if row["flags"] == {"lora_r": 16, "lora_alpha": 32})
    return {
        "trained-share": f"{row['trainable_params'] / row['total_params']:.2%}",
        "parameters": f"{row['total_params']:,}",
        "questions": f"{base['n']}",
        "seeds": f"{len(methods['full'])}",
        "score-base": f"{base['score']:.1%}",
        "score-full": f"{fmean(run['score'] for run in methods['full']):.1%}",
        "score-lora": f"{fmean(run['score'] for run in methods['lora-r16']):.1%}",
        "kept": f"{lora['retention']:.1%}",
        "kept-low": f"{lora['interval_with_seeds'][0]:.1%}",
        "kept-high": f"{lora['interval_with_seeds'][1]:.1%}",
    }


def planner_numbers() -> dict[str, str]:
    result = read_result(PLANS)
    budgets = [plan["flags"]["budget_gib"] for plan in result["plans"]]
    within = [
        plan for plan in result["plans"] if plan["measured"]["device_bytes"] <= plan["flags"]["budget_gib"] * GIB
    ]
    return {
        "plans": f"{len(budgets)}",
        "plans-within": f"{len(within)}",
        "smallest-budget": f"{min(budgets)}",
        "largest-budget": f"{max(budgets)} GiB",
        "choice-fastest": f"{turn_ratios(result)['fastest']:.2f}",
    }


def sources() -> dict[str, str]:
    """Of each picture what it was measured with, and the files that it is drawn from."""
    ladder, step = read_result("ladder.json"), read_result("gpu/step.json")
    gpu = step["machine"].rpartition(", ")[2]
    run = read_runs(LORA_RUNS)[1]["full"][0]["environment"]
    gpus = dict.fromkeys(gpu_of(name) for name in GPU_FILES.values())
    cpus = dict.fromkeys(versions(read_result(name)["machine"]) for name in CPU_FILES.values())
    return {
        "source-architecture": link("mgm_2b.json"),
        "source-ladder": f"{versions(ladder['versions'])}. {link('ladder.json')}",
        "source-prediction": f"{'; '.join(gpus)}; CPU, {'; '.join(cpus)}. "
        + " ".join(link(name) for name in (*GPU_FILES.values(), *CPU_FILES.values())),
        "source-speed": f"{gpu}, {versions(step['versions'])}. {link('gpu/step.json')}",
        "source-retention": f"CPU, {versions(run)}. {link('lora_vs_full')}",
        "source-front": f"{gpu_of('gpu/plans.json')}. {link('gpu/plans.json')}",
    }


def gpu_of(name: str) -> str:
    machine = read_result(name)["machine"]
    return f"{machine['gpu']}, PyTorch {machine['torch']}"


def versions(packages: dict[str, str]) -> str:
    """Those that a figure depends on, of what a result names."""
    names = {"torch": "PyTorch", "transformers": "transformers", "peft": "PEFT", "trl": "TRL", "liger-kernel": "Liger"}
    return ", ".join(f"{title} {packages[name]}" for name, title in names.items() if name in packages)


def link(name: str) -> str:
    """A sentence that is a link to a result."""
    return f"[{name}](../results/{name})."
