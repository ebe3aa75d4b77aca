"""What is real in a trace stays real, what depends on weights is fake, and where both meet."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from memory.partly_fake import PartlyFakeMode


@pytest.fixture
def fake_mode() -> PartlyFakeMode:
    return PartlyFakeMode()


def fake(fake_mode: PartlyFakeMode, *shape: int) -> torch.Tensor:
    with fake_mode:
        return torch.randn(*shape)


def test_what_is_computed_from_the_batch_has_values(fake_mode: PartlyFakeMode) -> None:
    """Positions, counts and choices by value; integers and flags that the model makes itself."""
    grid = torch.tensor([[1, 4, 6]])
    with fake_mode:
        positions = torch.arange(int(grid.prod())).reshape(grid[0].tolist()).flatten()
        is_even = positions % 2 == 0
        assert positions[is_even].tolist() == list(range(0, 24, 2))
        assert torch.zeros(3, dtype=torch.long).sum().item() == 0
        assert torch.ones(2, dtype=torch.bool).all()


def test_weights_and_what_comes_of_them_are_fake(fake_mode: PartlyFakeMode) -> None:
    """Random numbers and floats that make room are fake as well; whoever asks for a value gets an error."""
    weight, pixels = fake(fake_mode, 8, 4), torch.ones(3, 4)
    with fake_mode:
        features = pixels @ weight.T
        room = torch.zeros(3, 8)
        assert isinstance(features, FakeTensor) and isinstance(room, FakeTensor) and features.shape == (3, 8)
        room[torch.tensor([True, False, True])] = features[:2]
        with pytest.raises(DataDependentOutputException):
            bool(features.isfinite().all())


def test_integers_that_come_of_weights_are_fake(fake_mode: PartlyFakeMode) -> None:
    """Those of topk, sort and argmax, and the room that is made beside them for what is chosen."""
    scores = fake(fake_mode, 4, 8)
    with fake_mode:
        chosen = scores.topk(2).indices
        mask = chosen.new_zeros((4, 8), dtype=torch.bool).scatter(-1, chosen, True)
        found = (chosen, scores.sort().indices, scores.argmax(-1), mask, torch.zeros_like(chosen))
        assert all(isinstance(tensor, FakeTensor) for tensor in found)
        assert not isinstance(torch.zeros(4, 8, dtype=torch.bool), FakeTensor)


def test_masks_of_the_batch_select_from_what_is_fake(fake_mode: PartlyFakeMode) -> None:
    """The form of a selection by a mask is known, in one dimension or in two, and of what is repeated."""
    hidden_states, mask = fake(fake_mode, 2, 3, 5), torch.tensor([[True, False, True], [False, False, True]])
    with fake_mode:
        assert hidden_states[mask].shape == (3, 5)
        assert hidden_states[:, mask[0]].shape == (2, 2, 5)
        hidden_states[mask] = fake(fake_mode, 3, 5)
        assert hidden_states.flatten(0, 1).repeat_interleave(torch.tensor([1, 2, 3, 0, 0, 1]), 0).shape == (7, 5)


def test_a_real_tensor_that_something_fake_is_written_to_has_no_values_any_more(fake_mode: PartlyFakeMode) -> None:
    """Not through a view of it either; its like, made later, has."""
    pixels, features = torch.ones(2, 4), fake(fake_mode, 4)
    with fake_mode:
        row = pixels[0]
        assert row.copy_(features) is row
        assert not isinstance(pixels, FakeTensor) and isinstance(pixels * 2, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            pixels.sum().item()
        del pixels, row
        assert [torch.tensor([float(i)] * 8).sum().item() for i in range(64)] == [8.0 * i for i in range(64)]


def test_experts_in_fp32(fake_mode: PartlyFakeMode) -> None:
    """Tokens 0 to 2 go through the first of two experts, the others through the second, and back to the weights."""
    weights, ends = fake(fake_mode, 2, 16, 32).requires_grad_(), torch.tensor([3, 8], dtype=torch.int32)
    with fake_mode:
        output = torch.nn.functional.grouped_mm(torch.ones(8, 16), weights, offs=ends)
        assert output.shape == (8, 32)
        output.sum().backward()
    assert weights.grad.shape == weights.shape


def test_what_is_real_is_where_the_model_is() -> None:
    """The model's device is apart from the host: the batch may meet its weights, the host's tensors may not."""
    fake_mode = PartlyFakeMode("cpu:0")
    with fake_mode:
        weight, on_host = torch.randn(4, device="cpu:0"), torch.randn(4)
        assert (torch.arange(4) * weight).device == torch.device("cpu:0")
        with pytest.raises(RuntimeError, match="same device"):
            on_host * weight
        fake_mode.in_model = lambda: True
        assert torch.randn(4, device=torch.arange(4).device).device == torch.device("cpu:0")


def test_what_is_real_is_sent_to_the_model_without_a_copy() -> None:
    """As generate() does with each tensor. A copy that is asked for, and another dtype, are copies."""
    with PartlyFakeMode("cpu:0"):
        pixels = torch.arange(4, dtype=torch.float32)
        assert pixels.to("cpu:0").data_ptr() == pixels.data_ptr()
        assert pixels.to("cpu", copy=True).data_ptr() != pixels.data_ptr()
        assert pixels.to("cpu:0", torch.bfloat16).dtype == torch.bfloat16


def test_a_mask_of_all_pairs_of_many_positions_is_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few it is real; on the model's device, apart from the host, it is there."""
    monkeypatch.setattr("memory.partly_fake.LARGE", 1000)
    with PartlyFakeMode("cpu:0"):
        for length, is_large in ((30, False), (40, True)):
            positions = torch.arange(length)
            mask = positions[:, None] >= positions
            assert isinstance(mask, FakeTensor) == is_large and mask.dtype == torch.bool
            assert isinstance(mask[:, :1] & mask, FakeTensor) == is_large
    assert mask.device == torch.device("cpu:0") and mask.shape == (40, 40)
