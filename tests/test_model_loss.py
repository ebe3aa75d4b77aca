"""The loss around a model's own forward: what it takes from the model, what it refuses, what it leaves behind."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from layers.chunked_loss import LanguageModelHead
from layers.model_loss import use_model_loss
from mgm.modeling_mgm import MGMForConditionalGeneration
from utils import UserError


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = torch.randint(3, 49, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(9) < 4, -100, TOKENS)
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": LABELS}


def small(model_class: type = GemmaForCausalLM, chunked: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(GemmaConfig(**SIZES, **HEADS, head_dim=8)).train()
    use_model_loss(model, chunked)
    return model


def mixtral(chunked: bool, **flags) -> MixtralForCausalLM:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4, **flags)).train()
    use_model_loss(model, chunked)
    return model


class GemmaWith(GemmaForCausalLM):
    """A model that does something to its logits."""

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.change(self.lm_head(outputs.last_hidden_state))
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return type(super().forward(input_ids=input_ids))(loss=loss, logits=logits)


CHANGES = {
    "scaled": lambda logits: 3 * (logits / 0.5) * torch.tensor(0.7),
    "capped": lambda logits: torch.tanh(logits.float() / 0.1) * 0.1,
    "capped by a module": lambda logits: nn.Tanh()(logits).tanh().to(torch.float32).contiguous(),
    "cut": lambda logits: logits[..., : logits.shape[-1] - 1] * 2,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_steps_between_head_and_loss(change):
    """Loss and all gradients with those by way of the logits."""
    model_class = type("Changed", (GemmaWith,), {"change": staticmethod(change)})
    results = []
    for chunked in (True, False):
        model = small(model_class, chunked)
        loss = model(**BATCH, num_items_in_batch=11).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    plain = small()(**BATCH, num_items_in_batch=11).loss
    assert (plain - results[0][0]).abs() > 1e-4, "the step makes a difference"


UNKNOWN = {
    "logsumexp": lambda logits: logits.logsumexp(-1),
    "softmax": lambda logits: nn.functional.softmax(logits, dim=-1),
    "cat": lambda logits: torch.cat([logits, logits]),
    r"the index slice": lambda logits: logits[:, 1:],
    "a value written into them": lambda logits: logits.__setitem__((..., 3), 0),
    "a product with what is trained": lambda logits: logits * nn.Parameter(torch.ones(())),
    "tanh": lambda logits: torch.tanh(logits, out=torch.empty(1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_steps_are_refused_by_name(name):
    if name.startswith("the index"):
        name, change = r"the index \(slice", UNKNOWN[name]
    else:
        change = UNKNOWN[name]
    model = small(type("Changed", (GemmaWith,), {"change": staticmethod(change)}))
    with pytest.raises(UserError, match=rf"--loss chunked: .*{name}.*: choose --loss full") as error:
        model(**BATCH)
    assert "\n" not in str(error.value)
    assert_nothing_is_left(model)


def assert_nothing_is_left(model: PreTrainedModel) -> None:
    assert isinstance(model.lm_head, LanguageModelHead) and "lm_head" not in vars(model)
    assert model.loss_function is ForCausalLMLoss


class OwnLoss(GemmaForCausalLM):
    """A model that takes its loss itself."""

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


@pytest.mark.parametrize("chunked", [True, False])
def test_a_forward_that_takes_its_loss_itself(chunked):
    """Full: its loss would not be the mean over an update. Chunked: it finds no logits either."""
    with pytest.raises(UserError, match="OwnLoss cannot be trained|--loss chunked"):
        small(OwnLoss, chunked)(**BATCH)


class OwnHead(GemmaForCausalLM):
    """A model whose head is no linear layer."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Bilinear(config.hidden_size, config.hidden_size, config.vocab_size)


def test_a_head_of_another_class():
    with pytest.raises(UserError, match="--loss chunked: the head of OwnHead is of the class Bilinear: choose --loss"):
        small(OwnHead)
    small(OwnHead, chunked=False)


class Around(GemmaForCausalLM):
    """A model that leaves the head to a language model inside it, and takes the loss itself."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        del self.lm_head
        self.language_model = GemmaForCausalLM(config)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        output = self.language_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=50)
        return output


def test_a_head_in_a_model_inside():
    """Its loss and gradients are those of the inner model alone."""
    around = small(Around)
    inner = copy.deepcopy(around.language_model)
    use_model_loss(inner, chunked=False)
    losses = [model(**BATCH, num_items_in_batch=7) for model in (around, inner)]
    assert losses[0].logits is None
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    for output in losses:
        output.loss.backward()
    torch.testing.assert_close(around.language_model.lm_head.weight.grad, inner.lm_head.weight.grad)
    assert around.language_model.lm_head.__class__ is LanguageModelHead and "lm_head" not in vars(
        around.language_model
    )


class OtherLoss(GemmaForCausalLM):
    """A model with a loss of its own."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        self.loss_function = lambda logits, labels, **_: logits.square().mean()


def test_a_loss_that_is_no_cross_entropy():
    """It cannot be taken by chunks, and is left alone otherwise."""
    with pytest.raises(UserError, match="OtherLoss has a loss of its own, <lambda>: choose --loss full"):
        small(OtherLoss)(**BATCH)
    assert small(OtherLoss, chunked=False)(**BATCH).loss > 0


def test_without_logits_in_training_with_them_in_evaluation():
    for chunked in (True, False):
        model = small(chunked=chunked)
        trained = model(**BATCH, num_items_in_batch=7)
        assert trained.logits is None and "logits" not in trained and trained.past_key_values is None
        evaluated = model.eval()(**BATCH, num_items_in_batch=7)
        assert evaluated.logits.shape == (3, 9, 50)
        torch.testing.assert_close(evaluated.loss, trained.loss)
        assert model(input_ids=TOKENS).loss is None
        assert_nothing_is_left(model)


def test_given_positions_make_no_difference(monkeypatch):
    """The given ones are used: nothing is looked up, which would wait for a GPU."""
    model = small()
    positions = (LABELS != -100).flatten().nonzero().squeeze(1)
    expected = model(**BATCH).loss
    monkeypatch.setattr("layers.model_loss.find_label_positions", None)
    assert model(**BATCH, label_positions=positions).loss == expected
    assert model(**BATCH, label_positions=positions[:-1]).loss != expected


@pytest.mark.parametrize("chunked", [True, False])
def test_what_a_model_adds_to_its_loss_is_weighed_by_tokens(chunked):
    """A router's balance, over two micro-batches: the mean of both, weighed by label tokens."""
    plain, balanced = (mixtral(chunked, output_router_logits=on, router_aux_loss_coef=0.5) for on in (False, True))
    batches = [{name: tensor[rows] for name, tensor in BATCH.items()} for rows in (slice(0, 1), slice(1, 3))]
    counts = [5, 10]
    extra = [(balanced(**batch).loss - plain(**batch).loss).item() for batch in batches]
    shares = [balanced(**b, num_items_in_batch=15).loss - plain(**b, num_items_in_batch=15).loss for b in batches]
    assert extra[0] > 0.1 and extra[1] > 0.1
    assert sum(shares).item() == pytest.approx(sum(n * x for n, x in zip(counts, extra, strict=True)) / 15, rel=1e-5)


def test_a_copy_computes_with_its_own_weights(tiny_model):
    """copy.deepcopy of a model of transformers and of MGM: the copy's loss follows the copy's weights."""
    for model in (small(), tiny_model.train()):
        twin = copy.deepcopy(model)
        before = model(**BATCH).loss
        assert twin(**BATCH).loss == before
        with torch.no_grad():
            twin.get_output_embeddings().weight.mul_(2)
        assert twin(**BATCH).loss != before
        assert model(**BATCH).loss == before


def test_forward_keeps_its_signature():
    """`generate` and PEFT look at it."""
    for model, model_class in ((small(), GemmaForCausalLM), (None, MGMForConditionalGeneration)):
        forward = model_class.forward if model is None else model.forward
        names = inspect.signature(forward).parameters
        assert "labels" in names and "label_positions" not in names and forward.__name__ == "forward"
    before = small().forward.__func__
    assert before.computes_loss


def test_preparing_again_changes_the_flag_alone():
    model = small()
    expected = model(**BATCH).loss
    use_model_loss(model, chunked=False)
    assert not model.chunked_loss
    torch.testing.assert_close(model(**BATCH).loss, expected)


def test_a_label_in_the_first_column_counts_nowhere():
    labels = LABELS.clone()
    labels[1:, 0] = 7
    model = small()
    assert model(**BATCH | {"labels": labels}).loss == model(**BATCH).loss
