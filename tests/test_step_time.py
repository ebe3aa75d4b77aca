"""The two clocks, on lists of operations made by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.step_time import FittedRow, accuracy, scan
from memory.cards import GPUS
from memory.gpus import Speed
from memory.step_time import CONSTANTS, Constants, device_seconds, filled_share, seconds_of, step_seconds
from memory.work import Operation


# A GPU of one operation a second in 16 bits, half of that in fp32, 10 bytes of memory and 1 byte of PCIe a second.
SPEED = Speed(1.0, 0.5, 10.0, 1.0, 0.0, 1)
# A host of a second an operator in Python, half of that in the engine, a tenth a view, two a module, three a product.
HOST = Constants(1.0, 0.5, 0.1, 2.0, 3.0, 0.5, 5.0, 10.0, 1.0, 0.25)


def kernel(seconds: float, is_python: bool = True, **others: int) -> Operation:
    """One that the GPU needs so long for, because of its bytes."""
    return Operation("kernel", "add", "forward", is_python, nbytes=int(10 * seconds), **others)


WAIT = Operation("wait", "wait", "step", True)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([kernel(0.5)] * 4, 4.5),  # the host is slower: the last one begins at 4
        ([kernel(3)] * 4, 1 + 12),  # the GPU is slower: it begins at 1 and never waits
        ([kernel(3), *[kernel(0.1)] * 8], 9.1),  # first the one, then the other
        ([kernel(0.1, is_python=False)] * 4, 2.1),
        ([kernel(0.1, views=5)], 1.6),
        ([kernel(0.1, modules=1)], 3.1),
        ([kernel(5), WAIT, kernel(1)], 1 + 5 + 1 + 1),  # without the wait 1 + 5 + 1
        ([kernel(5), kernel(1)], 7),
        ([WAIT, kernel(1)], 2),
        ([Operation("transfer", "copy_", "forward", True, nbytes=3), kernel(1)], 1.5 + 3 + 1),
        ([Operation("transfer", "copy_", "forward", True, nbytes=3, stream=1), kernel(1)], 1.5 + 3),  # side by side
        ([kernel(3), Operation("transfer", "copy_", "forward", True, nbytes=3, stream=1)], 2.5 + 3),
        ([replace(kernel(1), name="gemm_4bit")], 1 + 5 + 1),
        ([replace(kernel(1), product=(1, 128, 8, 256))], 1 + 3 + 1),
        ([Operation("host", "Adam", "step", True, nbytes=30)], 3 + 1),
        ([], 0),
    ],
)
def test_two_clocks(operations: list[Operation], expected: float) -> None:
    assert seconds_of(operations, SPEED, HOST) == pytest.approx(expected)


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_micro_batches_in_between(seconds: float) -> None:
    """Five of them take as long as five written out, whichever clock decides."""
    first, last = [kernel(seconds)] * 3, [*[kernel(seconds)] * 3, WAIT, kernel(1.0)]
    found = step_seconds([first, last], SPEED, 5, HOST)
    assert found == pytest.approx(seconds_of(first * 4 + last, SPEED, HOST))
    assert step_seconds([last], SPEED, 1, HOST) == seconds_of(last, SPEED, HOST)


def test_arithmetic_or_traffic() -> None:
    """The longer of both, by dtype; attention reaches a quarter of the rate; each launch takes its time."""
    product = Operation("kernel", "mm", "forward", True, nbytes=10, flops=8, dtype=torch.bfloat16)
    assert device_seconds(product, SPEED, HOST) == 8
    assert device_seconds(replace(product, dtype=torch.float32), SPEED, HOST) == 16
    assert device_seconds(replace(product, nbytes=1000), SPEED, HOST) == 100
    assert device_seconds(replace(product, name="_flash_attention"), SPEED, HOST) == 32
    assert device_seconds(replace(product, launches=3), replace(SPEED, kernel_seconds=2.0), HOST) == 14


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        ((1, 128 * 132, 4096, 256), 1),  # one wave of 132 tiles
        ((1, 128 * 133, 4096, 128), 133 / 264),  # a second wave for one tile
        ((1, 128, 512, 256), 2 / 132),  # two tiles of 128 x 128, too short to be split
        ((1, 128, 512 * 66, 256), 1),  # each of them is split among 66
        ((132, 64, 128, 128), 0.5),  # half of each tile
    ],
)
def test_how_much_of_a_gpu_a_product_fills(product: tuple[int, int, int, int], expected: float) -> None:
    assert filled_share(product, 132) == pytest.approx(expected)


def test_cards_in_the_order_of_their_speed() -> None:
    """A step of products and traffic."""
    product = Operation("kernel", "mm", "forward", True, 10**9, 1, 10**12, torch.bfloat16, (1, 8192, 8192, 8192))
    work = [[*[product] * 9, replace(product, nbytes=10**8, flops=0)]]
    order = ["h200", "h100", "a100", "rtx5090", "rtx4090", "v100", "rtx5080", "rtxa4000", "rtx3090", "t4", "rtx3060"]
    assert sorted(order, key=lambda name: step_seconds(work, GPUS[name].speed)) == order


def test_accuracy_by_hand() -> None:
    """Errors of 10, 20 and 50 %; of the three pairs one is in the wrong order."""
    pairs = [(1.5, 3.0), (1.6, 2.0), (1.1, 1.0)]
    rows = [{"predicted": {"step_seconds": p}, "measured": {"step_seconds": m}} for p, m in pairs]
    found = accuracy(rows, "step_seconds")
    assert found == pytest.approx({"rows": 3, "median_error": 0.2, "worst_error": 0.5, "pairs_in_order": 2 / 3})


def test_constants_are_found_again() -> None:
    """From updates that another host would take so long for."""
    speed, true = GPUS["h100"].speed, replace(CONSTANTS, python_seconds=40e-6, engine_seconds=10e-6)
    rows = []
    for num_python, num_engine in ((10, 1), (1, 10), (5, 5)):
        operations = [kernel(0, True)] * num_python + [kernel(0, False)] * num_engine
        rows.append(FittedRow({"step_seconds": seconds_of(operations, speed, true), "busy_seconds": 1.0}, operations))
    found = scan(
        CONSTANTS,
        [("python_seconds",), ("engine_seconds",)],
        lambda constants: sum(row.squared_error(speed, constants) for row in rows),
    )
    assert found.python_seconds == pytest.approx(40e-6, rel=0.03)
    assert found.engine_seconds == pytest.approx(10e-6, rel=0.03)
    assert found.view_seconds == CONSTANTS.view_seconds
