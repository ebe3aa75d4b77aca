"""Estimate the seconds of an update from its operations, by two clocks.

The host issues one operator after the other. The GPU runs each kernel for as long as its arithmetic or its memory
traffic takes, whichever is longer; it begins when the host has issued it and the kernel before it has ended. So the
slower of the two decides, at each point of the step. Where the host waits for a result, both clocks meet.

    step_seconds(record.work, GPUS["rtx4090"].speed, num_micro_batches=8)
"""

from dataclasses import dataclass

import torch

from memory.cards import GPUS
from memory.config import ProbeConfig
from memory.gpus import Speed
from memory.record import Record
from memory.work import Operation


@dataclass(frozen=True)
class Constants:
    """What holds for all cards.

    Args:
        python_seconds: the host's, of an operator that Python code issues: the forward pass, recomputation, the
            optimizer's step.
        engine_seconds: of one that autograd's engine issues, in the backward pass.
        view_seconds: of one that launches nothing.
        module_seconds: of the call of a module, besides its operators.
        product_seconds: of each matrix product, besides: its inputs are cast, and a library chooses a kernel for it.
        transfer_seconds: of each transfer, besides: under ZeRO-3, of DeepSpeed's code around a weight that it fetches.
        packed_seconds: of each of bitsandbytes' operators, besides: they are written in Python.
        host_bytes_per_second: of the host's memory, where the optimizer runs there.
        product_share: of the rate of large products, what a step's products reach.
        attention_share: what attention reaches. Its products are small, and softmax stands between them.
    """

    python_seconds: float
    engine_seconds: float
    view_seconds: float
    module_seconds: float
    product_seconds: float
    transfer_seconds: float
    packed_seconds: float
    host_bytes_per_second: float
    product_share: float
    attention_share: float


# `python -m benchmarks.step_time --mode fit` computes them from measured steps.
CONSTANTS = Constants(
    python_seconds=9.98e-6,
    engine_seconds=11.6e-6,
    view_seconds=1.45e-6,
    module_seconds=6.23e-6,
    product_seconds=59e-6,
    transfer_seconds=378e-6,
    packed_seconds=162e-6,
    host_bytes_per_second=50e9,
    product_share=0.813,
    attention_share=0.404,
)
# They grow together: the slower the host, the longer its Python.
PYTHON = ("python_seconds", "view_seconds", "module_seconds")
# Rows and columns of a product's result that a multiprocessor computes at a time.
TILES = ((128, 256), (128, 128))
PACKED = ("gemm_4bit", "dequantize_4bit", "dequantize_blockwise")
SPLIT = 512  # the shortest part of the factors' common side, where several multiprocessors share it


def time_of(record: Record, config: ProbeConfig) -> dict[str, float | None]:
    """`step_seconds` of an update and `tokens_per_second` of all processes; None: nothing is known of it (a CPU)."""
    if not record.work:
        return {"step_seconds": None, "tokens_per_second": None}
    seconds = step_seconds(record.work, GPUS[config.gpu].speed, config.gradient_accumulation_steps)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return {"step_seconds": seconds, "tokens_per_second": config.max_seq_len * rows / seconds}


def step_seconds(
    work: list[list[Operation]], speed: Speed, num_micro_batches: int = 1, constants: Constants = CONSTANTS
) -> float:
    """Seconds of an update. `work`: the operations of its first micro-batch, and of its last, which has the
    optimizer's step. Those between do what the first one does."""
    first, last = work[0], work[-1]
    if num_micro_batches == 1:
        return seconds_of(last, speed, constants)
    two = seconds_of(first + last, speed, constants)
    three = seconds_of(first * 2 + last, speed, constants)
    return two + (num_micro_batches - 2) * (three - two)


def seconds_of(operations: list[Operation], speed: Speed, constants: Constants = CONSTANTS) -> float:
    """Seconds from the first operation to the end of the last one."""
    issued = 0.0  # when the host has issued what came so far
    done = {0: 0.0}  # when each of the GPU's streams has done it
    for operation in operations:
        issued += host_seconds(operation, constants)
        if operation.kind == "wait":
            issued = max(issued, *done.values())
        elif operation.kind != "host":
            start = max(issued, done.get(operation.stream, 0.0))
            done[operation.stream] = start + device_seconds(operation, speed, constants)
    return max(issued, *done.values())


def host_seconds(operation: Operation, constants: Constants = CONSTANTS) -> float:
    """What the host does until it has issued the operation. A wait as such takes none."""
    seconds = operation.views * constants.view_seconds + operation.modules * constants.module_seconds
    if operation.kind == "wait":
        return seconds
    if operation.kind == "host":
        seconds += operation.nbytes / constants.host_bytes_per_second
    elif operation.kind == "transfer":
        seconds += constants.transfer_seconds
    elif operation.name in PACKED:
        seconds += constants.packed_seconds
    elif operation.product is not None:
        seconds += constants.product_seconds
    return seconds + (constants.python_seconds if operation.is_python else constants.engine_seconds)


def device_seconds(operation: Operation, speed: Speed, constants: Constants = CONSTANTS) -> float:
    """How long the GPU works on it."""
    if operation.kind == "transfer":
        return operation.nbytes / speed.pcie_bytes_per_second + speed.kernel_seconds
    rate = speed.fp32_flops if operation.dtype == torch.float32 else speed.matmul_flops
    if "attention" in operation.name:
        rate *= constants.attention_share
    else:
        rate *= constants.product_share
    if operation.product is not None:
        rate *= filled_share(operation.product, speed.num_multiprocessors)
    arithmetic, traffic = operation.flops / rate, operation.nbytes / speed.memory_bytes_per_second
    return max(arithmetic, traffic) + operation.launches * speed.kernel_seconds


def filled_share(product: tuple[int, int, int, int], num_multiprocessors: int) -> float:
    """The share of a GPU that a matrix product [m, k] @ [k, n] fills. Tiles of its result are computed in waves, one
    on each multiprocessor, and the last wave may be small; of few tiles each is split along k."""
    batch, m, k, n = product
    shares = []
    for rows, columns in TILES:
        num_tiles = batch * -(-m // rows) * -(-n // columns)
        num_parts = num_tiles * min(max(k // SPLIT, 1), max(num_multiprocessors // num_tiles, 1))
        num_waves = -(-num_parts // num_multiprocessors)
        share_of_tiles = batch * m * n / (num_tiles * rows * columns)
        shares.append(share_of_tiles * num_parts / (num_waves * num_multiprocessors))
    return max(shares)


def busy_seconds(operations: list[Operation], speed: Speed, constants: Constants = CONSTANTS) -> float:
    """How long the GPU works in all."""
    on_device = (operation for operation in operations if operation.kind in ("kernel", "transfer"))
    return sum(device_seconds(operation, speed, constants) for operation in on_device)


def issue_seconds(operations: list[Operation], phase: str, constants: Constants = CONSTANTS) -> float:
    """How long the host works in a phase."""
    return sum(host_seconds(operation, constants) for operation in operations if operation.phase == phase)
