"""The loss without logits against the loss with them: values and gradients, of the head alone and of the model."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_gradients

from layers import chunked_loss
from layers.chunked_loss import IGNORE_INDEX, LanguageModelHead
from memory.cpu_profile import memory_events, profile_memory, rise
from mgm.modeling_mgm import MGMForConditionalGeneration


VOCAB_SIZE, HIDDEN_SIZE = 300, 16


def make_head(weight_is_trained: bool, dtype: torch.dtype = torch.float32) -> LanguageModelHead:
    torch.manual_seed(0)
    return LanguageModelHead(HIDDEN_SIZE, VOCAB_SIZE, bias=False).to(dtype).requires_grad_(weight_is_trained)


def loss_and_gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("weight_is_trained", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_head_is_cross_entropy(monkeypatch, chunk_size, weight_is_trained):
    """Also in chunks that do not divide the tokens, and with words that do not divide into rows."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * chunk_size * VOCAB_SIZE)
    monkeypatch.setattr(chunked_loss, "PIECE_BYTES", 4 * 3 * VOCAB_SIZE)
    monkeypatch.setattr(chunked_loss, "WEIGHT_GRADIENT_ROWS", 128)
    head = make_head(weight_is_trained)
    hidden_states = torch.randn(50, HIDDEN_SIZE, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (50,))
    inputs = [hidden_states] + [head.weight] * weight_is_trained
    # Logits of up to 100: exp alone would overflow.
    found = loss_and_gradients(head(30 * hidden_states, targets) / 13, *inputs)
    expected = loss_and_gradients(F.cross_entropy(head(30 * hidden_states), targets, reduction="sum") / 13, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("is_trained", [False, True])
def test_head_with_a_bias_and_steps(monkeypatch, is_trained):
    """What a bias, a scale and a soft cap make of the logits, and what all of them get as gradients."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 7 * VOCAB_SIZE)
    monkeypatch.setattr(chunked_loss, "PIECE_BYTES", 4 * 3 * VOCAB_SIZE)
    torch.manual_seed(0)
    head = LanguageModelHead(HIDDEN_SIZE, VOCAB_SIZE).requires_grad_(is_trained)
    hidden_states = torch.randn(50, HIDDEN_SIZE, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (50,))
    steps = (lambda x: x / 0.3, torch.tanh, lambda x: x * 0.3, lambda x: x * 9)
    logits = 9 * 0.3 * torch.tanh(head(hidden_states) / 0.3)
    inputs = [hidden_states, *([head.weight, head.bias] if is_trained else [])]
    found = loss_and_gradients(head(hidden_states, targets, steps) / 13, *inputs)
    expected = loss_and_gradients(F.cross_entropy(logits, targets, reduction="sum") / 13, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_head_in_16_bits_is_never_copied_to_fp32():
    """Under autocast a norm may give hidden states in fp32. The head's product is made in its own dtype, as autocast
    would make it."""
    head = make_head(weight_is_trained=False, dtype=torch.bfloat16)
    hidden_states = torch.randn(50, HIDDEN_SIZE, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (50,))
    found = loss_and_gradients(head(hidden_states, targets), hidden_states)
    expected = loss_and_gradients(head(hidden_states.bfloat16(), targets), hidden_states)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, [6, 6, 6, 2, 6, 6, 6, 2, 6, 4]), (torch.bfloat16, [6] * 6 + [4, 6, 4])]
)
def test_chunk_and_piece_sizes(monkeypatch, dtype, sizes):
    """Chunks of so many bytes in the dtype of the hidden states, and pieces of them of so many in fp32."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 20 * VOCAB_SIZE)
    monkeypatch.setattr(chunked_loss, "PIECE_BYTES", 4 * 6 * VOCAB_SIZE)
    work, found = chunked_loss._replace_by_gradient, []
    monkeypatch.setattr(chunked_loss, "_replace_by_gradient", lambda *args: found.append(len(args[0])) or work(*args))
    make_head(False, dtype)(torch.randn(50, HIDDEN_SIZE).to(dtype), torch.zeros(50, dtype=torch.long))
    assert found == sizes


def test_one_chunk_at_a_time(monkeypatch):
    """The peak is a chunk's logits and what stays, the hidden states' gradients: no chunk waits for the next."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 50 * 20_000)
    head = LanguageModelHead(HIDDEN_SIZE, 20_000, bias=False).requires_grad_(False)
    hidden_states, targets = torch.randn(256, HIDDEN_SIZE, requires_grad=True), torch.randint(0, 20_000, (256,))
    with profile_memory() as profiler:
        head(hidden_states, targets)
    assert 1 <= rise(memory_events(profiler)) / (20_000 * 4 * 50) < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_rounding(dtype):
    """Gradients in 16 bits, before the loss is scaled, against fp32's: fp16 would lose small ones if N came first."""
    head = make_head(weight_is_trained=True, dtype=dtype)
    hidden_states = torch.randn(50, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (50,))
    scale = 2.0**16 / 10**6  # a loss scale and the label tokens of an update
    found = loss_and_gradients(head(hidden_states, targets) * scale, hidden_states, head.weight)
    wide_head = make_head(weight_is_trained=True).to(dtype).float()
    wide_states = hidden_states.detach().float().requires_grad_()
    expected = loss_and_gradients(
        F.cross_entropy(wide_head(wide_states), targets, reduction="sum") * scale, wide_states, wide_head.weight
    )
    for one, other in zip(found, expected, strict=True):
        assert ((one.float() - other).norm() / other.norm()).item() < 2 * torch.finfo(dtype).eps
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype


def test_head_without_targets_keeps_the_graph():
    """A batch in which nothing is labelled: a loss of 0 and gradients of 0, not None."""
    head = make_head(weight_is_trained=True)
    hidden_states = torch.randn(0, HIDDEN_SIZE, requires_grad=True)
    loss = head(hidden_states, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and head.weight.grad is not None and not head.weight.grad.any()


def make_batch(model: MGMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Three rows: an image and some labels, padding, no label at all."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(6, 500, (3, 40), generator=generator)
    input_ids[:, :16] = model.config.image_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 30:] = 0
    labels = input_ids.clone()
    labels[:, :20], labels[1, 30:], labels[2] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    size, size_aux = model.config.vision_config.image_size, model.config.vision_config_aux.image_size
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": torch.randn(3, 3, size, size, generator=generator),
        "pixel_values_aux": torch.randn(3, 3, size_aux, size_aux, generator=generator),
    }


def train_step(model: MGMForConditionalGeneration, is_chunked: bool, **inputs) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model.chunked_loss = is_chunked
    output = model(**inputs)
    output.loss.backward()
    assert output.logits is None
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": output.loss.detach()} | gradients


@pytest.mark.parametrize("num_items_in_batch", [None, 123, torch.tensor(123)])
def test_model_trains_alike_without_logits(tiny_model, num_items_in_batch):
    """Loss and all gradients, the tied embedding's among them, within 1e-5 of those by way of the logits."""
    inputs = make_batch(tiny_model) | {"num_items_in_batch": num_items_in_batch}
    expected, found = (train_step(tiny_model, is_chunked, **inputs) for is_chunked in (False, True))
    assert_same_gradients(found, expected)


def test_given_label_positions_are_those_looked_up(tiny_model):
    inputs = make_batch(tiny_model)
    positions = (inputs["labels"] != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    looked_up = train_step(tiny_model, True, **inputs)
    given = train_step(tiny_model, True, **inputs, label_positions=positions)
    assert all(torch.equal(given[name], tensor) for name, tensor in looked_up.items())


def test_label_of_a_rows_first_token_counts_nowhere(tiny_model):
    """Nothing comes before it; the last token of the row above must not be taken for that."""
    inputs = make_batch(tiny_model)
    expected = train_step(tiny_model, True, **inputs)["loss"]
    inputs["labels"][1:, 0] = 7
    assert train_step(tiny_model, True, **inputs)["loss"] == expected


@pytest.mark.parametrize("num_items_in_batch", [None, 5])
def test_batch_without_a_label_has_no_loss(tiny_model, num_items_in_batch):
    inputs = make_batch(tiny_model)
    inputs["labels"][:] = IGNORE_INDEX
    found = train_step(tiny_model, True, **inputs, num_items_in_batch=num_items_in_batch)
    assert found["loss"] == 0
    assert len(found) > 100 and not any(tensor.any() for tensor in found.values())


def test_evaluation_has_loss_and_logits(tiny_model):
    output = tiny_model(**make_batch(tiny_model))
    assert output.loss > 0 and output.logits.shape == (3, 40, 512)
