"""What a recorder notes of single tensors and operators, against PyTorch's profiler and by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from layers.quantization import quantize_linear, state_tensors
from memory.cpu_profile import memory_events, rise
from memory.kernels import CPU_WORKSPACES
from memory.record import TraceError
from memory.recorder import Recorder
from memory.trace import fake_model


def test_record_of_single_tensors() -> None:
    """1024 bytes and a view of them are one allocation, which lives until the last of them is gone; 100 bytes more.
    What is released after the recording is not part of it."""
    with FakeTensorMode(), Recorder(nn.Identity()) as recorder:
        x = torch.empty(256)
        view = x.view(16, 16)[3:]
        y = torch.empty(100, dtype=torch.uint8)
        del x
        view.add_(1)
        del view
    del y
    assert [nbytes for nbytes, _ in recorder.record.events] == [1024, 100, -1024]


def summed_gradients(weight: torch.Tensor, ids: torch.Tensor, kind: str) -> torch.Tensor:
    uses = {
        "products": lambda: (weight * 2).sum() + (weight * 3).sum(),
        "layers": lambda: (
            nn.functional.linear(weight[:4], weight).sum() + nn.functional.linear(weight[:2], weight).sum()
        ),
        "selected": lambda: weight.index_select(0, ids).sum(),
        "indexed": lambda: weight[ids].sum(),
        "gathered": lambda: weight.gather(0, ids[:, None].expand(-1, 64)).sum(),
        "largest": lambda: weight.topk(2).values.sum(),
        "tied": lambda: nn.functional.linear(nn.functional.embedding(ids, weight), weight).sum(),
    }
    return uses[kind]()


@pytest.mark.parametrize("kind", ["products", "layers", "tied", "selected", "indexed", "gathered", "largest"])
def test_sums_of_gradients(kind: str) -> None:
    """Two gradients of one weight of 256,000 bytes: the profiler's events of real tensors and the record of fake ones.
    Autograd sums those of products in place, those of linear layers (views) not, and puts what was selected back in
    place."""
    weight, ids = nn.Parameter(torch.ones(1000, 64)), torch.arange(16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        summed_gradients(weight, ids, kind).backward()
    with FakeTensorMode() as fake_mode:
        fake_weight = nn.Parameter(torch.empty(1000, 64))
        fake_ids = fake_mode.from_tensor(ids)
        with Recorder(nn.Identity()) as recorder:
            recorder.allocated(fake_weight, "load")
            loss = summed_gradients(fake_weight, fake_ids, kind)
            recorder.enter_phase("backward")
            loss.backward()
    recorded = [nbytes for nbytes, _ in recorder.record.events[1:]]
    assert [n for n in recorded if abs(n) >= 256_000] == [n for n in memory_events(profiler) if abs(n) >= 256_000]


@pytest.mark.parametrize(
    ("operation", "op"),
    [(torch.nonzero, "aten.nonzero.default"), (torch.Tensor.item, "aten._local_scalar_dense.default")],
)
def test_what_depends_on_data_is_an_error(operation: object, op: str) -> None:
    """It names the operator: the memory of nonzero depends on the values, what follows item() may."""
    with FakeTensorMode(), Recorder(nn.Identity()), pytest.raises(TraceError, match=op):
        operation(torch.ones(()) if op.startswith("aten._") else torch.ones(3))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: x * y,
        lambda x, y: x.mul_(y),
        lambda x, y: y.add_(x),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: y / 3,
        lambda x, y: x.long() - 0.5,
    ],
)
def test_dtypes_that_mix(operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """fp32 and bf16, 4000 and 2000 bytes: the most that the profiler sees in use and the record of fake tensors."""
    pair = (torch.ones(1000), torch.ones(1000, dtype=torch.bfloat16))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        operation(*pair)
    with FakeTensorMode() as fake_mode, Recorder(nn.Identity(), CPU_WORKSPACES) as recorder:
        fake_pair = [fake_mode.from_tensor(tensor) for tensor in pair]
        for tensor in fake_pair:
            recorder.allocated(tensor, "load")
        operation(*fake_pair)
    assert recorder.record.peak_bytes - 6000 == pytest.approx(rise(memory_events(profiler)), abs=16)


def test_a_4_bit_layer_on_the_cpu() -> None:
    """Forward and backward of a layer whose weight, 1 MiB whole, is larger than all else: every allocation that the
    profiler sees is recorded of fake tensors, those inside the forward's kernel as one."""
    linear, gradient = nn.Linear(512, 512, bias=False), torch.ones(16, 512)
    layer, x = quantize_linear(linear, torch.float32), torch.ones(16, 512, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x).backward(gradient)
    meta_layer, fake_mode = quantize_linear(linear.to("meta"), torch.float32), FakeTensorMode()
    fake_layer = fake_model(meta_layer, "cpu", fake_mode)
    with fake_mode:
        fake_x, fake_gradient = torch.ones(16, 512, requires_grad=True), torch.ones(16, 512)
        with Recorder(fake_layer, CPU_WORKSPACES) as recorder:
            for tensor in [fake_x, fake_layer.weight, *(tensor for _, tensor in state_tensors(fake_layer))]:
                recorder.allocated(tensor, "load")
            num_loaded = len(recorder.record.events)
            fake_layer(fake_x).backward(fake_gradient)
    recorded, measured = [n for n, _ in recorder.record.events[num_loaded:]], memory_events(profiler)
    assert rise(recorded) == rise(measured) > 4 * 512 * 512
    num_forward = recorded.index(max(recorded)) + 2
    assert recorded[num_forward:] == measured[7:], "the backward pass"
