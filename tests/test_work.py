"""What a trace notes of operators: operations against torch's own counter, bytes and waits by hand."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memory.config import ProbeConfig
from memory.probed_step import ProbedStep, local_accelerator
from memory.recorder import Recorder
from memory.trace import trace_single
from memory.work import Operation, flops_of, sent_bytes


KIB = 1024


def noted(operation: Callable[[], object]) -> list[Operation]:
    """What is noted of code on fake tensors."""
    with FakeTensorMode(), Recorder(nn.Identity()) as recorder:
        recorder.work.start()
        recorder.enter_phase("forward")
        operation()
    return recorder.work.micro_batches[0]


@pytest.mark.parametrize(
    ("operation", "names", "nbytes"),
    [
        (lambda: torch.ones(256) + torch.ones(256), ["ones", "ones", "add"], [1, 1, 3]),
        (lambda: torch.empty(256).mul_(2), ["mul_"], [2]),
        (lambda: torch.empty(16, 16).t()[2:].reshape(4, -1), ["clone"], [2 * 14 / 16]),
        (lambda: torch.empty(256).bfloat16(), ["_to_copy"], [1.5]),
        (lambda: torch.empty(256).copy_(torch.empty(256)), ["copy_"], [2]),
        (lambda: torch.empty(16, 16) + torch.empty(16, 1).expand(16, 16), ["add"], [2 + 1 / 16]),
        # Of a large table only the rows that are looked up.
        (lambda: F.embedding(torch.empty(4).long(), torch.empty(999, 256)), ["_to_copy", "embedding"], [0, 8]),
        (lambda: torch.empty(999, 256).index_select(0, torch.empty(1).int()), ["_to_copy", "index_select"], [0, 2]),
        (lambda: torch._foreach_add_([torch.empty(256)] * 2, [torch.empty(256)] * 2), ["_foreach_add_"], [6]),
    ],
)  # fmt: skip
def test_bytes_by_hand(operation: Callable[[], object], names: list[str], nbytes: list[float]) -> None:
    """In KiB. Views and what makes room launch nothing and cost nothing."""
    operations = noted(operation)
    assert [each.name for each in operations] == names
    assert [each.nbytes / KIB for each in operations] == pytest.approx(nbytes, abs=0.05)
    assert {each.kind for each in operations} == {"kernel"}


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("allreduce_", [1000], 2 * 750),
        ("_allgather_base_", [1000, 250], 750),
        ("allgather_", [250, 250, 250, 250, 250], 750),
        ("_reduce_scatter_base_", [250, 1000], 750),
        ("broadcast_", [1000], 750),
    ],
)
def test_collectives_by_hand(name: str, sizes: list[int], expected: int) -> None:
    """Of 1000 bytes that four processes share, each sends three quarters; one alone sends nothing."""
    tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    assert sent_bytes(name, tensors, 4) == expected
    assert sent_bytes(name, [torch.empty(10)] * 2, 1) == 0


def test_a_product() -> None:
    """[4, 8] @ [8, 2]: 2 x 64 operations, 32 + 16 + 8 values."""
    (found,) = noted(lambda: torch.empty(4, 8) @ torch.empty(8, 2))
    assert (found.flops, found.product, found.nbytes) == (128, (1, 4, 8, 2), 4 * 56)


def test_causal_attention_counts_half() -> None:
    """Two products of 2 heads, 64 x 64 positions, 16 wide."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention

    def attend(is_causal: bool) -> Operation:
        return noted(lambda: attention(*torch.empty(3, 1, 2, 64, 16, dtype=torch.bfloat16), 0.0, is_causal))[-1]

    assert attend(False).flops == 2 * 2 * 2 * 64 * 64 * 16
    assert attend(True).flops == attend(False).flops // 2


def test_heads_that_share_keys_count_as_others() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    query, key, value = (torch.empty(1, heads, 64, 16, dtype=torch.bfloat16) for heads in (4, 1, 1))
    assert flops_of(attention.default, (query, key, value), None) == 4 * 2 * 2 * 64 * 64 * 16


def test_a_convolution_whose_input_needs_no_gradient() -> None:
    """Its backward pass is one of the two products: 2 x 64 outputs x 4 channels of 3 x 3 pixels of 3 channels."""
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    with Recorder(convolution) as recorder:
        recorder.work.start()
        recorder.enter_phase("forward")
        convolution(torch.ones(1, 3, 8, 8)).sum().backward()
    found = {each.name: each.flops for each in recorder.work.micro_batches[0]}
    assert found["convolution"] == found["convolution_backward"] == 2 * 64 * 4 * 9 * 3


def test_a_product_with_the_dtype_of_its_result() -> None:
    """An overload of addmm, which torch's counter takes for a shape."""
    a = torch.ones(8, 8, device="meta", dtype=torch.bfloat16)
    func = torch.ops.aten.addmm.dtype
    assert flops_of(func, (a, a, a, torch.float32), a) == 2 * 8**3


def test_views_and_modules_are_counted() -> None:
    """At the operator after them."""
    module = nn.Linear(8, 8)
    with Recorder(module) as recorder:
        recorder.work.start()
        recorder.enter_phase("forward")
        module(torch.ones(8, 8).view(64).view(8, 8))
    ones, product = recorder.work.micro_batches[0]
    assert (ones.views, ones.modules) == (0, 0)
    assert (product.name, product.views, product.modules) == ("addmm", 3, 1)  # the weight's transpose too


def test_who_issues_what() -> None:
    """The engine issues a backward pass, Python the forward pass."""
    x = nn.Parameter(torch.ones(8, 8))
    with Recorder(nn.Identity()) as recorder:
        recorder.work.start()
        recorder.enter_phase("forward")
        loss = (x * x).sum()
        recorder.enter_phase("backward")
        loss.backward()
    operations = recorder.work.micro_batches[0]
    assert {each.phase: each.is_python for each in operations} == {"forward": True, "backward": False}


def test_what_the_host_waits_for() -> None:
    """Numbers, and how much a mask selects."""
    assert [each.kind for each in noted(lambda: None)] == []
    with Recorder(nn.Identity()) as recorder:
        recorder.work.start()
        recorder.enter_phase("forward")
        x = torch.arange(4)
        x.sum().item()
        x[x > 2]
        x[torch.tensor([1, 2])]
    counts = Counter(each.name for each in recorder.work.micro_batches[0])
    assert counts["wait"] == 2 and counts["index"] == 1


def test_gradients_are_clipped_at_once() -> None:
    """A GPU takes all of them in one operation."""
    tensors = [torch.ones(256) for _ in range(3)]
    with Recorder(nn.Identity()) as recorder:
        recorder.work.start()
        recorder.enter_phase("forward")
        recorder.enter_phase("step")
        for tensor in tensors:
            torch.linalg.vector_norm(tensor)
        for tensor in tensors:
            tensor.mul_(0.5)
    norms, scaling = recorder.work.micro_batches[0]
    assert (norms.name, scaling.name) == ("linalg_vector_norm", "mul_")
    assert (norms.nbytes, scaling.nbytes) == (3 * (KIB + 4), 3 * 2 * KIB)


def tiny_config(**flags: object) -> ProbeConfig:
    defaults = {"model": "tiny", "mixed_precision": "no", "max_seq_len": 48, "lora_r": 8, "eval_samples": 0}
    return ProbeConfig(mode="predict", **(defaults | flags))


def test_operations_of_a_real_step() -> None:
    """The trace for a GPU against torch's counter of a real step on this CPU, with eager attention, which both
    count. The counter leaves out LoRA's addmm_, which adds to the frozen layer's output, and fails at tiled MLPs,
    which are frozen ones."""
    flags = {"attn_implementation": "eager", "lora_target_modules": ["all-linear"]}
    config = tiny_config(**flags, device="cpu")
    with local_accelerator(config) as accelerator:
        probed = ProbedStep.build(config, accelerator)
        probed.prepare()
        probed.run_updates(1)
        with FlopCounterMode(display=False) as counter:
            probed.run_updates(1)
    config = tiny_config(**flags, device="cuda")
    (operations,) = trace_single(config).work
    assert sum(each.flops for each in operations if each.name != "addmm_") == counter.get_total_flops() > 1e8


def test_micro_batches() -> None:
    """Two of them, of which the last has the optimizer's step and a wait for the norm before it; a CPU's trace notes
    nothing."""
    work = trace_single(tiny_config(gradient_accumulation_steps=5, device="cuda")).work
    assert [{each.phase for each in operations} >= {"forward", "backward"} for operations in work] == [True, True]
    assert ["_fused_adamw_" in {each.name for each in operations} for operations in work] == [False, True]
    last = [each.name for each in work[-1] if each.phase == "step"]
    assert last.index("linalg_vector_norm") < last.index("wait") < last.index("_fused_adamw_")
    assert trace_single(tiny_config(device="cpu")).work == []


@pytest.mark.slow
def test_offloading_is_seen() -> None:
    """ZeRO-3 with everything offloaded: weights come over PCIe, and the host updates what is trained."""
    from memory.predict import trace_step

    config = tiny_config(config_file="accelerate_configs/zero3.yaml", mixed_precision="bf16", lora_r=0)
    (operations,) = trace_step(config).device.work
    moved = sum(each.nbytes for each in operations if each.kind == "transfer")
    (adam,) = (each for each in operations if each.name == "Adam")
    trained = adam.nbytes / 28
    assert trained > 1e5 and moved > 2 * trained
