"""Accuracy, memory and time of several ways to compute a language model's loss at its labelled positions:

    python -m benchmarks.loss                                  # no GPU; five minutes of one core
    python -m benchmarks.loss --device cuda --vocab_size 256000 --hidden_size 2048 --tokens 2048

A way runs forward and backward through the loss alone, with a frozen head. Ways take turns; the time is the median.
Errors are against the same loss in fp64. Writes results/loss_DEVICE.json.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from layers import chunked_loss
from layers.chunked_loss import ChunkedCrossEntropy
from memory.cpu_profile import memory_events, profile_memory, rise
from utils import check_device, check_minimum, flag, run_script, write_json


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # hidden states, weight, targets
POLICIES = ("compact", "balanced", "accurate")  # of torch's linear_cross_entropy


@dataclass(kw_only=True)
class LossConfig:
    device: str = flag("cpu", "cpu | cuda")
    vocab_size: int = 65536
    hidden_size: int = 768
    tokens: int = flag(1024, "of the row")
    label_share: float = flag(0.3, "of the tokens")
    rounds: int = 5
    output: str | None = flag(None, "default results/loss_DEVICE.json")

    def __post_init__(self) -> None:
        check_device(self.device)
        check_minimum(self, vocab_size=2, hidden_size=1, tokens=1, rounds=1)
        self.output = self.output or f"results/loss_{self.device}.json"


def main(config: LossConfig) -> dict:
    inputs = make_inputs(config)
    exact = run(full, *(x.double() if x.is_floating_point() else x for x in inputs), config.label_share)
    rows = {}
    for name, loss in ways().items():
        found = run(loss, *inputs, config.label_share)
        rows[name] = {
            "loss_error": abs(float(found[0]) / float(exact[0]) - 1),
            "gradient_error": float((found[1].double() - exact[1]).norm() / exact[1].norm()),
            "peak_bytes": peak_bytes(loss, inputs, config),
        }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(config.rounds):
        for name, loss in ways().items():
            start = time.perf_counter()
            run(loss, *inputs, config.label_share)
            if config.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["seconds"] = statistics.median(seconds[name])
        print(f"{name:<28} {row}", flush=True)
    device = torch.cuda.get_device_name() if config.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": device, "torch": torch.__version__, "config": asdict(config), "rows": rows}
    write_json(config.output, result)
    return {"rows": len(rows), "output": config.output}


def make_inputs(config: LossConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, D], the head's weight [V, D] and targets [T], in the dtype that trains on the device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    hidden_states = torch.randn(config.tokens, config.hidden_size, device=config.device).to(dtype)
    weight = (0.02 * torch.randn(config.vocab_size, config.hidden_size, device=config.device)).to(dtype)
    return hidden_states, weight, torch.randint(config.vocab_size, (config.tokens,), device=config.device)


def run(
    loss: Loss, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, label_share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the labelled positions, the row's last ones, and its gradient for the hidden states."""
    hidden_states = hidden_states.detach().requires_grad_()
    first = round(len(targets) * (1 - label_share))
    if loss is all_positions:
        value = loss(hidden_states, weight, torch.where(torch.arange(len(targets)).to(targets) < first, -100, targets))
    else:
        value = loss(hidden_states[first:], weight, targets[first:])
    value.backward()
    return value.detach(), hidden_states.grad


def ways() -> dict[str, Loss]:
    found = {"all positions": all_positions, "labelled positions": full}
    for num_tokens in (16, 64, 128, 256, 512):
        found[f"ours, chunks of {num_tokens}"] = partial(ours, num_tokens)
    found["checkpointed chunks"] = partial(checkpointed_chunks, 256)
    if hasattr(F, "linear_cross_entropy"):  # from PyTorch 2.13 on
        from torch.nn import LinearCrossEntropyOptions

        for policy in POLICIES:
            found[f"linear_cross_entropy {policy}"] = partial(torchs, LinearCrossEntropyOptions(acc_policy=policy))
    return found


def all_positions(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As transformers does: the logits of every position, in fp32."""
    return F.cross_entropy((hidden_states @ weight.T).float(), targets, reduction="sum", ignore_index=-100)


def full(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden_states @ weight.T
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")


def ours(chunk_tokens: int, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with patch.object(chunked_loss, "CHUNK_BYTES", chunk_tokens * len(weight) * weight.itemsize):
        return ChunkedCrossEntropy.apply(hidden_states, weight, targets)


def checkpointed_chunks(
    chunk_size: int, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """As TRL and torchtune do: the backward pass recomputes each chunk's logits."""
    parts = zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True)
    return sum(checkpoint(full, states, weight, labels, use_reentrant=False) for states, labels in parts)


def torchs(options: object, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.linear_cross_entropy(hidden_states, weight, targets, reduction="sum", options=options)


def peak_bytes(loss: Loss, inputs: tuple[torch.Tensor, ...], config: LossConfig) -> int:
    """The most that is allocated at once, beside the inputs."""
    if config.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(loss, *inputs, config.label_share)
        return torch.cuda.max_memory_allocated() - before
    with profile_memory() as profiler:
        run(loss, *inputs, config.label_share)
    return rise(memory_events(profiler))


if __name__ == "__main__":
    run_script(main, LossConfig)
