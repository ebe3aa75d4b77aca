"""docs/interview.md: every figure comes from results/ or from the model's sizes, every answer has a figure and a link.

tests/test_chinese.py compares the Chinese page with it.
"""

import json
import re
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.lora_vs_full_report import read_runs, retentions
from benchmarks.memory_tables import share_bytes
from benchmarks.scaling_tables import efficiency
from memory.allocator import LARGE_SEGMENT_BYTES, MIN_LARGE_REQUEST_BYTES, SMALL_REQUEST_BYTES, SMALL_SEGMENT_BYTES
from memory.margin import FULL_LOSS_MARGIN, ZERO3_MARGIN, ZERO3_MARGIN_OF_SEVERAL
from mgm.configuration_mgm import mgm_2b
from train import TrainConfig
from utils import GIB, MIB


ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/interview.md").read_text()
PROSE = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->|\]\([^)]*\)", "", TEXT, flags=re.S)  # without tables and addresses
QUESTIONS = re.findall(r"^### (\d+)\. [^\n]+\?\n(.+?)(?=\n#)", TEXT, flags=re.M | re.S)
GIVEN = {"22.66 GiB", "12 GiB"}  # the message of the run that began the project; a budget
FOUR_ROWS = {"model": "mgm-2b", "per_device_train_batch_size": 4}  # of benchmarks/scaling.py
UNITS = r"GiB|MiB|KiB|%|ms|TFLOP|times|configurations|images a second|updates old"
FIGURE = re.compile(rf"\d[\d.,]* (?:to \d[\d.]* )?(?:{UNITS})\b|\d[\d.,]* %|\d{{1,3}}(?:,\d{{3}})+|[\d.]+e-\d+")


def read(name: str) -> Any:
    return json.loads((ROOT / "results" / name).read_text())


def row_of(rows: list[dict[str, Any]], **flags: Any) -> dict[str, Any]:
    (found,) = (row for row in rows if row["flags"] == flags)
    return found


def titled(rows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    (found,) = (row for row in rows if row["title"] == title)
    return found


def gib(nbytes: float, digits: int = 2) -> str:
    return f"{nbytes / GIB:.{digits}f} GiB"


def mib(nbytes: float) -> str:
    return f"{nbytes / MIB:.0f} MiB"


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}".replace("%", " %")


def sizes_of_the_model() -> dict[str, str]:
    """Counted from the config: parameters of LoRA, the bytes of logits, of scores and of a layer's input."""
    text = mgm_2b().text_config
    hidden, values, layers = text.hidden_size, text.num_key_value_heads * text.head_dim, text.num_hidden_layers
    q_or_o, v = 16 * (hidden + hidden), 16 * (hidden + values)
    return {
        "500.00 MiB": f"{1024 * text.vocab_size * 2 / MIB:.2f} MiB",
        "256,000": f"{text.vocab_size:,}",
        "1000 MiB": mib(2048 * text.vocab_size * 2),
        "64 MiB": mib(text.num_attention_heads * 2048**2 * 2),
        "8 MiB": mib(2048 * hidden * 2),
        "144 MiB": mib(layers * 2048 * hidden * 2),
        "4,194,304": f"{hidden**2:,}",
        "65,536": f"{q_or_o:,}",
        "36,864": f"{v:,}",
        "3,022,848": f"{layers * (2 * q_or_o + v):,}",
    }


def sizes_of_the_allocator() -> dict[str, str]:
    """memory/allocator.py's constants."""
    sizes = (SMALL_REQUEST_BYTES, SMALL_SEGMENT_BYTES, MIN_LARGE_REQUEST_BYTES, LARGE_SEGMENT_BYTES)
    return dict(zip(("1 MiB", "2 MiB", "10 MiB", "20 MiB"), map(mib, sizes), strict=True))


def trained_parameters() -> dict[str, str]:
    """results/mgm_2b.json."""
    results = read("mgm_2b.json")
    rank_8, rank_16, rank_32, all_linear, projector, full = results["lora"]
    host, _, full_host, *_ = (row["host"] for row in results["host"])
    trained, all_trained = rank_16["trainable_params"], full["trainable_params"]
    return {
        "3.02 B": f"{rank_16['total_params'] / 1e9:.2f} B",
        "16,281,856": f"{trained:,}",
        "13,259,008": f"{projector['trainable_params']:,}",
        "2,519,431,424": f"{all_trained:,}",
        "0.54 %": percent(trained / rank_16["total_params"], 2),
        "28.2 GiB": gib(12 * all_trained, 1),
        "0.18 GiB": gib(12 * trained),
        "62 MiB": mib(4 * trained),
        "38.47 GiB": gib(share_bytes(full, 1, ())),
        "4.81 GiB": gib(share_bytes(full, 8, ("weights", "gradients", "optimizer state"))),
        "0.46 GiB": gib(all_linear["device_bytes"] - rank_16["device_bytes"]),
        "0.07 GiB": gib(rank_32["device_bytes"] - rank_8["device_bytes"]),
        "70.7 GiB": gib(sum(full_host.values()), 1),
        "9.4 GiB": gib(sum(host.values()), 1),
        "14.26 GiB": gib(full_host["pinned_rounding"]),
    }


def predicted_sizes() -> dict[str, str]:
    """results/ladder.json and results/headline.json."""
    ladder, headline = read("ladder.json"), read("headline.json")
    rungs, without = ladder["rungs"], titled(ladder["without"], "gradient checkpointing")
    tiles, lora, peak = rungs[-1], titled(rungs, "LoRA r=16"), "peak_allocated_bytes"
    full = titled(rungs, "gradient checkpointing")

    def device(strategy: str, rank: int = 16) -> str:
        row = row_of(headline["rows"], lora_r=rank, max_seq_len=2048, strategy=strategy)
        return gib(row["device_bytes"]["rtx4090"], 1)

    return {
        "40.47 GiB": gib(full[peak]),
        "1.99 GiB": gib(full["breakdown"]["temporaries"]),
        "13.20 GiB": gib(lora[peak]),
        "6000 MiB": mib(lora["breakdown"]["loss"]),
        "5.62 GiB": gib(lora["breakdown"]["weights"]),
        "7.80 GiB": gib(titled(rungs, "no logits")[peak]),
        "6.31 GiB": gib(titled(rungs, "mining from the query's side")[peak]),
        "6.26 GiB": gib(tiles[peak]),
        "0.05 GiB": gib(rungs[-2][peak] - tiles[peak]),
        "9.49 GiB": gib(without[peak]),
        "3.2 GiB": gib(without[peak] - tiles[peak], 1),
        "27.6 TFLOP": f"{tiles['flops'] / 1e12:.1f} TFLOP",
        "21.7 TFLOP": f"{without['flops'] / 1e12:.1f} TFLOP",
        "1.28 times": f"{tiles['flops'] / without['flops']:.2f} times",
        "1.95 GiB": gib(titled(ladder["branches"], "ZeRO-3, all offloaded")[peak]),
        "7.0 GiB": device("single"),
        "7.7 GiB": device("zero2"),
        "7.4 GiB": device("zero3 + offload", rank=0),
        "22.5 GiB": gib(headline["estimates"]["accelerate"], 1),
        "2.0 GiB": gib(headline["estimates"]["zero3 + offload"], 1),
    }


def measured_sizes() -> dict[str, str]:
    """results/gpu/matrix.json, and the errors of its predictions."""
    rows = [row for row in read("gpu/matrix.json")["rows"] if "predicted" in row and not row["measured"]["oom"]]
    defaults, eager = row_of(rows, lora_r=16, max_seq_len=2048), row_of(rows, attn_implementation="eager")
    logits = row_of(rows, loss="full", lora_r=16, max_seq_len=2048)["measured"]
    full = row_of(rows, lora_r=0, max_seq_len=2048)["measured"]
    zero3 = row_of(rows, config_file="accelerate_configs/zero3.yaml")
    zero3_plan = next(row for row in read("gpu/plans.json")["plans"] if row["chosen"]["strategy"] == "zero3")
    peaks = [row["measured"]["peak_allocated_bytes"] for row in (defaults, eager)]
    errors = [(row["predicted"]["device_bytes"] / row["measured"]["device_bytes"] - 1, row) for row in rows]
    worst, its_row = max(errors, key=lambda error: abs(error[0]))
    assert its_row["flags"]["loss"] == "full" and worst < 0
    return {
        "7.1 GiB": gib(defaults["measured"]["device_bytes"], 1),
        "43.3 GiB": gib(full["device_bytes"], 1),
        "3.3 GiB": gib(zero3["measured"]["device_bytes"], 1),
        "6.35 GiB": gib(peaks[0]),
        "6.66 GiB": gib(peaks[1]),
        "0.31 GiB": gib(peaks[1] - peaks[0]),
        "11.96 GiB": gib(logits["peak_allocated_bytes"]),
        "13.87 GiB": gib(logits["peak_reserved_bytes"]),
        "14.62 GiB": gib(logits["device_bytes"]),
        "37 configurations": f"{len(rows)} configurations",
        "0.18 %": percent(median(abs(error) for error, _ in errors), 2),
        "6.0 %": percent(-worst),
        "6.3 %": percent(1 - zero3_plan["predicted"]["device_bytes"] / zero3_plan["measured"]["device_bytes"]),
        "8 %": percent(FULL_LOSS_MARGIN, 0),
        "12 %": percent(ZERO3_MARGIN, 0),
        "14 %": percent(ZERO3_MARGIN_OF_SEVERAL, 0),
        "11.64 GiB": gib(
            row_of(read("gpu/plans.json")["plans"], model="mgm-2b", budget_gib=12)["predicted"]["device_bytes"]
        ),
    }


def several_gpus() -> dict[str, str]:
    """results/gpu/scaling.json."""
    rows = read("gpu/scaling.json")["rows"]
    small = {row["flags"]["strategy"]: row for row in rows if row["flags"].items() >= FOUR_ROWS.items()}
    errors = [row["predicted"]["device_bytes"] / row["measured"]["device_bytes"] - 1 for row in rows]
    shares = {"97 %": "ddp", "75 %": "fsdp2", "48 %": "zero3"}
    one_row = next(row for row in rows if row["flags"] == {"model": "mgm-2b", "strategy": "single", "world_size": 1})
    return {figure: percent(efficiency(small[name], rows), 0) for figure, name in shares.items()} | {
        "11.6 %": percent(-min(errors)),
        "103 ms": f"{1000 * one_row['measured']['step_seconds']:.0f} ms",
    }


def losses() -> dict[str, str]:
    """results/loss_cuda.json and results/loss_cpu.json."""
    gpu, cpu = read("loss_cuda.json"), read("loss_cpu.json")

    def milliseconds(row: dict[str, float]) -> str:
        return f"{1000 * row['seconds']:.0f} ms"

    usual, small, ours = (gpu["rows"][way] for way in ("all positions", "ours, chunks of 64", "ours, chunks of 256"))
    checkpointed, torchs = gpu["rows"]["checkpointed chunks"], cpu["rows"]["linear_cross_entropy compact"]
    assert mib(usual["peak_bytes"]) == "6000 MiB"
    assert f"{usual['gradient_error']:.1e}" == f"{ours['gradient_error']:.1e}"
    return {
        "30 %": percent(gpu["config"]["label_share"], 0),
        "190 MiB": mib(ours["peak_bytes"]),
        "4 ms": milliseconds(ours),
        "12 ms": milliseconds(usual),
        "96 MiB": mib(small["peak_bytes"]),
        "8 ms": milliseconds(small),
        "751 MiB": mib(checkpointed["peak_bytes"]),
        "7 ms": milliseconds(checkpointed),
        "1.7e-03": f"{ours['gradient_error']:.1e}",
        "4 MiB": mib(torchs["peak_bytes"]),
        "7654 ms": milliseconds(torchs),
        "65 MiB": mib(cpu["rows"]["ours, chunks of 256"]["peak_bytes"]),
        "691 ms": milliseconds(cpu["rows"]["ours, chunks of 256"]),
    }


def seconds() -> dict[str, str]:
    """results/gpu/step.json, results/gpu/step_time.json, and what packing and the loader did."""
    steps = read("gpu/step.json")
    rows = [row for row in steps["rows"] if row["flags"]["model"] == "mgm-2b" and row["flags"]["rows"] == 1]
    by_way = {(row["flags"]["way"], row["flags"]["gradient_checkpointing"]): row for row in rows}
    times = {key: f"{1000 * row['median_seconds']:.0f} ms" for key, row in by_way.items()}
    busy = {key: f"{1000 * row['activity']['busy_seconds']:.0f} ms" for key, row in by_way.items()}
    ratios = sorted(ratio["speed_against_best"] for ratio in steps["ratios"] if ratio["rows"] == 1)
    estimates = read("gpu/step_time.json")["held_out"]["step_seconds"]
    loader = {run["num_workers"]: f"{run['images_per_second']:.1f}" for run in read("loader.json")["runs"]}
    return {
        "165 ms": times["", True],
        "86 ms": times["", False],
        "62 ms": busy["", True],
        "49 ms": busy["", False],
        "675 ms": times["zero3", True],
        "234 ms": times["nf4", True],
        "1.26 to 1.81 times": f"{ratios[0]:.2f} to {ratios[-1]:.2f} times",
        "15 %": percent(estimates["median_error"], 0),
        "33 %": percent(estimates["worst_error"], 0),
        "90 %": percent(estimates["pairs_in_order"], 0),
        "0.78 times": f"{read('packing.json')['cases']['demo']['speedup_of_packing']['shuffled']:.2f} times",
        "30.7 images a second": f"{loader[1]} images a second",
        "40.4": loader[0],
        "50.9": loader[2],
    }


def quality() -> dict[str, str]:
    """results/lora_vs_full/ and results/families.json."""
    kept = {name: percent(result["retention"]) for name, result in retentions().items()}
    rank_8 = [percent(run["score"]) for run in read_runs(ROOT / "results/lora_vs_full")[1]["lora-r8"]]
    families = read("families.json")["rows"]
    return {
        "48 families": f"{len({row['flags']['family'] for row in families})} families",
        "294 rows": f"{len(families)} rows",
        "90.2 %": kept["lora-r8"],
        "95.4 %": kept["lora-r16"],
        "97.8 %": kept["lora-r32"],
        "99.0 %": kept["all-linear-r16"],
        "23.4 %": kept["projector"],
        **dict(zip(("87.6 %", "88.6 %", "70.1 %"), rank_8, strict=True)),
        "0.005 %": percent(max(abs(row["error"]) for row in families), 3),
    }


def said_elsewhere() -> dict[str, str]:
    """What other documents and tests say."""
    memory, reliability, readme = (
        (ROOT / name).read_text() for name in ("docs/memory.md", "docs/reliability.md", "README.md")
    )
    assert "blocks of 1 to 2 GiB" in memory
    assert "at most 1.2 times the trained state" in reliability and "logits within 2e-5" in readme
    return {
        "1 to 2 GiB": "1 to 2 GiB",
        "1.2 times": "1.2 times",
        "2e-5": "2e-5",
        "100 updates old": f"{TrainConfig.save_steps} updates old",
    }


SOURCES = (
    sizes_of_the_model,
    sizes_of_the_allocator,
    trained_parameters,
    predicted_sizes,
    measured_sizes,
    several_gpus,
    losses,
    seconds,
    quality,
    said_elsewhere,
)


@cache
def known() -> dict[str, str]:
    """Each figure as the page has it, and as the results have it."""
    return {figure: found for source in SOURCES for figure, found in source().items()}


def test_figures_are_those_of_the_results():
    assert {figure: found for figure, found in known().items() if figure != found} == {}
    text = " ".join(PROSE.split())
    assert [figure for figure in known() if figure not in text] == []


def test_no_figure_is_of_another_source():
    found = {figure.strip() for figure in FIGURE.findall(" ".join(PROSE.split()))}
    assert found - set(known()) == GIVEN and len(found) > 90


def test_every_answer_has_a_figure_and_a_file():
    assert [int(number) for number, _ in QUESTIONS] == list(range(1, 31))
    for number, answer in QUESTIONS:
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^):]+)\)", answer)]
        assert links and all((ROOT / "docs" / link).is_file() for link in links), number
        assert any(figure in " ".join(answer.split()) for figure in known()), number
