"""The tables of docs/memory.md: what each technique saves, and the ways to compute the loss; and those of
docs/interview.md."""

from typing import Any

from benchmarks.rows import read_result
from memory.report import duration
from utils import GIB, MIB, markdown_table


LOSSES = {"a CPU": "loss_cpu.json", "a GPU": "loss_cuda.json"}


def ladder_table() -> str:
    """results/ladder.json: each technique added to those above it, what it saves when used alone, and the peak with
    all others but without it."""
    ladder = read_result("ladder.json")
    start = ladder["rungs"][0]["peak_allocated_bytes"]
    without = {row["title"]: gib(row["peak_allocated_bytes"]) for row in ladder["without"]}
    alone = {row["title"]: gib(start - row["peak_allocated_bytes"]) for row in ladder["alone"]}
    rows = []
    for title, row in zip(ladder_titles(ladder), [*ladder["rungs"], *ladder["branches"]], strict=True):
        rows.append([title, gib(row["peak_allocated_bytes"]), gib(row["device_bytes"])])
        rows[-1] += [f"{row['flops'] / 1e12:.1f}" if row["flops"] else ""]
        rows[-1] += [alone.get(row["title"], ""), without.get(row["title"], "")]
    header = ["technique", "allocated", "device, RTX 4090", "TFLOP a step", "saved when used alone", "peak without it"]
    return markdown_table(header, rows)


def ladder_titles(ladder: dict[str, Any]) -> list[str]:
    """Each rung adds to those above it; a branch adds to all rungs, not to the other branch."""
    rungs = [("+ " if index else "") + row["title"] for index, row in enumerate(ladder["rungs"])]
    return rungs + [f"{word} {row['title']}" for word, row in zip(("then", "or"), ladder["branches"], strict=True)]


def gib(nbytes: float, digits: int = 2) -> str:
    return f"{nbytes / GIB:.{digits}f} GiB"


def loss_table() -> str:
    """results/loss_*.json: the same loss computed in different ways, on each device."""
    parts = []
    for device, name in LOSSES.items():
        found = read_result(name)
        config = found["config"]
        labelled = round(config["tokens"] * config["label_share"])
        rows = [
            [way, f"{row['peak_bytes'] / MIB:.0f} MiB", f"{1000 * row['seconds']:.0f} ms"]
            + [f"{row['gradient_error']:.1e}"]
            for way, row in found["rows"].items()
        ]
        parts += [
            f"On {device} ({found['device']}, PyTorch {found['torch']}): {config['tokens']} tokens, {labelled} of "
            f"them labelled, {config['vocab_size']:,} vocabulary entries, hidden size {config['hidden_size']}.",
            markdown_table(["method", "memory on top of the inputs", "time", "error of the gradient"], rows),
        ]
    return "\n\n".join(parts)


# Bytes of a trained parameter in mixed precision with AdamW (arXiv:1910.02054, section 3), and what each stage splits.
STATES = {"weights": 2, "gradients": 2, "optimizer state": 12}
STAGES = {
    "none (DDP)": (),
    "ZeRO-1": ("optimizer state",),
    "ZeRO-2": ("optimizer state", "gradients"),
    "ZeRO-3": ("optimizer state", "gradients", "weights"),
}


def zero_stages_table() -> str:
    """A GPU's share of MGM-2B's weights, gradients and optimizer state, by stage and number of GPUs."""
    rows = read_result("mgm_2b.json")["lora"]
    (full,) = (row for row in rows if row["flags"] == {"lora_r": 0})
    (lora,) = (row for row in rows if row["flags"] == {"lora_r": 16, "lora_alpha": 32})
    columns = {"full, 1 GPU": (full, 1), "full, 2 GPUs": (full, 2), "full, 8 GPUs": (full, 8)}
    columns |= {"LoRA, 1 GPU": (lora, 1), "LoRA, 8 GPUs": (lora, 8)}
    cells = [
        [stage, ", ".join(split) or "nothing", *(gib(share_bytes(*column, split)) for column in columns.values())]
        for stage, split in STAGES.items()
    ]
    return markdown_table(["stage", "split", *columns], cells)


def share_bytes(row: dict[str, Any], num_gpus: int, split: tuple[str, ...]) -> float:
    """What one GPU holds: a frozen parameter has a weight alone."""
    trained, total = row["trainable_params"], row["total_params"]
    sizes = {name: nbytes * trained for name, nbytes in STATES.items()}
    sizes["weights"] = STATES["weights"] * total
    return sum(nbytes / num_gpus if name in split else nbytes for name, nbytes in sizes.items())


def checkpointed_table() -> str:
    """results/mgm_2b.json: memory and time by what is recomputed."""
    cells = []
    for row in read_result("mgm_2b.json")["checkpointed"]:
        layers = [row["flags"].get(f"checkpoint_num_{what}") for what in ("layers", "mlps")]
        cells.append(["`--no_gradient_checkpointing`", ""] if layers[0] is None else layers)
        cells[-1] += [gib(row[name]) for name in ("peak_allocated_bytes", "device_bytes")] + [duration(row)]
    header = ["layers recomputed whole", "MLPs recomputed alone", "allocated", "device", "an update"]
    return markdown_table(header, cells)


def checkpointing_table() -> str:
    """results/ladder.json: all techniques, without gradient checkpointing and with it."""
    ladder = read_result("ladder.json")
    (without,) = (row for row in ladder["without"] if row["title"] == "gradient checkpointing")
    cells = []
    for title, row in (("no", without), ("yes", ladder["rungs"][-1])):
        activations = f"{row['breakdown']['activations'] / MIB:.0f} MiB"
        cells.append([title, gib(row["peak_allocated_bytes"]), activations, f"{row['flops'] / 1e12:.1f}"])
    return markdown_table(["gradient checkpointing", "allocated", "of which activations", "TFLOP a step"], cells)
