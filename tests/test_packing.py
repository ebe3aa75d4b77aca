"""Rows of several samples: the plan, the batch, and that packed training is the training of its samples one by one."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_gradients, has_no_gradient
from PIL import Image
from test_encoding import processor_of
from torch.utils.data import DataLoader

import step
from chat.arguments import per_token
from data.batching import BatchCollator, TrainCollator, UpdateBatchSampler
from data.dataset import ConversationDataset, open_dataset
from data.lengths import column_values, measure_lengths
from data.packing import PackedCollator, PackedDataset, Packing, pack
from layers.chunked_loss import IGNORE_INDEX
from mgm.processing_mgm import MGMProcessor
from models.loading import load_processor
from step import StepConfig
from train import TrainConfig
from training.run_log import RunLog
from utils import UserError


def skewed_lengths(num_samples: int, longest: int = 2048) -> np.ndarray:
    """Mostly short, some very long, as in real data: tokens a sample."""
    lengths = np.random.default_rng(1).lognormal(5, 1, num_samples).astype(int) + 10
    return np.minimum(lengths, longest)


def rows_of(packing: Packing) -> list[list[int]]:
    return [packing[row].tolist() for row in range(len(packing))]


@pytest.mark.parametrize("num_samples", [1, 2, 37, 4000])
def test_every_sample_is_in_one_row(num_samples):
    """Each sample once, no row too long."""
    num_tokens = skewed_lengths(num_samples)
    packing = pack(num_tokens, 2048, 0)
    assert sorted(sum(rows_of(packing), [])) == list(range(num_samples))
    totals = [num_tokens[row].sum() for row in rows_of(packing)]
    assert max(totals) <= 2048
    assert packing.sums(num_tokens).tolist() == totals


@pytest.mark.parametrize("row_length", [2048, 4096, 16384])
def test_rows_are_full(row_length):
    """No two rows would go into one, and of skewed lengths hardly anything is left empty."""
    num_tokens = skewed_lengths(4000)
    packing = pack(num_tokens, row_length, 0)
    totals = np.sort(packing.sums(num_tokens))
    assert totals[0] + totals[1] > row_length
    assert num_tokens.sum() / (len(packing) * row_length) > 0.98


def test_long_samples_are_packed_as_well_as_sorted_ones():
    """An image and a text are over a quarter of a row: 88 % full, as best-fit decreasing fills them; shuffled 85 %."""
    generator = np.random.default_rng(0)
    text = np.minimum(generator.lognormal(5.2, 0.7, 20_000), 1400).astype(int) + 20
    num_tokens = np.minimum(text + 576 * (generator.random(20_000) < 0.94), 2048)
    assert num_tokens.sum() / (len(pack(num_tokens, 2048, 0)) * 2048) > 0.87


def test_short_samples_are_mixed():
    """Dozens of short samples share a row whatever their lengths: sorted, all would be of one length."""
    num_tokens = np.random.default_rng(0).integers(30, 50, 4000)
    spreads = [np.ptp(num_tokens[row]) for row in rows_of(pack(num_tokens, 2048, 0))]
    assert np.mean(spreads) > 15


def test_the_seed_decides():
    """The same seed packs alike, another otherwise."""
    num_tokens = skewed_lengths(400)
    assert rows_of(pack(num_tokens, 2048, 1)) == rows_of(pack(num_tokens, 2048, 1))
    assert rows_of(pack(num_tokens, 2048, 1)) != rows_of(pack(num_tokens, 2048, 2))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_updates_of_rows(num_processes):
    """Each epoch has every sample once, in its own order; the label tokens of each update are those of its rows."""
    num_label_tokens = np.random.default_rng(0).integers(1, 50, 401)
    packing = pack(skewed_lengths(401), 2048, 0)
    shape = (2, 4, num_processes)
    sampler = UpdateBatchSampler(packing.sums(num_label_tokens), *shape, 42)
    epochs = []
    for epoch in range(2):
        sampler.start_at(epoch)
        samples = [sum((rows_of(packing)[row] for row in update), []) for update in sampler.updates()]
        assert sorted(sum(samples, [])) == list(range(401))
        assert sampler.label_tokens_per_update() == [num_label_tokens[update].sum() for update in samples]
        epochs.append(samples)
    assert epochs[0] != epochs[1]


@pytest.fixture
def dataset(tmp_path: Path) -> ConversationDataset:
    """Text alone, an image, two images far apart, a reply of two turns; no two images alike."""
    for color in ("red", "green", "blue", "white", "black"):
        Image.new("RGB", (20, 10), color).save(tmp_path / f"{color}.png")
    ask, answer = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}
    chat = [{"from": "human", "value": "Name a color."}, {"from": "gpt", "value": "Red."}]
    long = {"from": "gpt", "value": "It is a very long story about a sign. " * 2}
    records = [
        {"conversations": chat},
        {"image": "red.png", "conversations": [ask, long]},
        {"image": ["green.png", "blue.png"], "conversations": [ask, answer, ask, long]},
        {"image": "white.png", "conversations": [ask, answer, *chat]},
        {"conversations": [*chat, *chat]},
        {"image": "black.png", "conversations": [ask, answer]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return open_dataset(tmp_path / "data.json")


# Several images in a row, one that ends with text, one of text alone, one sample alone: rows of different lengths.
ROWS = [[1, 2, 0], [0, 4], [3, 5, 4, 1], [2]]


def test_collator(dataset, processor):
    """A packed batch with what the processor makes of each sample: tokens, labels, positions; images in order."""
    packing = Packing(np.array(sum(ROWS, [])), np.cumsum([0] + [len(row) for row in ROWS[:-1]]))
    rows = PackedDataset(dataset, packing)
    collate = PackedCollator(processor, 1000)
    batch = collate([rows[i] for i in range(len(rows))])
    assert batch.keys() == set(
        "input_ids labels position_ids image_positions label_positions pixel_values pixel_values_aux".split()
    )
    for i, row in enumerate(ROWS):
        encoded = [processor.tokenize(dataset[sample]["conversations"]) for sample in row]
        input_ids = sum((ids for ids, _ in encoded), [])
        end = len(input_ids)
        assert batch["input_ids"][i, :end].tolist() == input_ids
        assert batch["labels"][i, :end].tolist() == sum((labels for _, labels in encoded), [])
        assert batch["position_ids"][i, :end].tolist() == sum((list(range(len(ids))) for ids, _ in encoded), [])
        assert (batch["labels"][i, end:] == IGNORE_INDEX).all() and (batch["position_ids"][i, end:] == 0).all()
    assert (batch["input_ids"].flatten()[batch["image_positions"]] == processor.image_token_id).all()
    assert len(batch["label_positions"]) == (batch["labels"] != IGNORE_INDEX).sum()
    images = [image for row in ROWS for sample in row for image in dataset[sample]["images"]]
    expected = torch.stack([processor.image_views(image, "pad")[0] for image in images])
    assert torch.equal(batch["pixel_values"], expected)
    (sent,) = DataLoader(rows, batch_sampler=[[0, 1, 2, 3]], collate_fn=collate, num_workers=1)
    torch.testing.assert_close(sent, batch)  # a worker has a thread of its own: pixels within rounding


def test_a_samples_first_token_has_no_label(dataset, processor, monkeypatch):
    """Where a template trains on everything, the sample before must not be asked for the next one's first token."""
    template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    monkeypatch.setattr(processor, "chat_template", "{% generation %}" + template + "{% endgeneration %}")
    batch = PackedCollator(processor, 1000)([[dataset[0], dataset[4]]])
    is_first = batch["position_ids"] == 0
    assert is_first.sum() == 2
    assert (batch["labels"][is_first] == IGNORE_INDEX).all()
    assert (batch["labels"][~is_first] != IGNORE_INDEX).all()
    records = measure_lengths(dataset.records.select([0, 4]), processor, 1000)
    assert (~is_first).sum() == column_values(records, "num_label_tokens").sum()


def build_model(**flags: object) -> torch.nn.Module:
    """train.py's model in training mode, without dropout, its adapter no longer zero."""
    config = StepConfig(lora_dropout=0.0, **flags)
    model = step.build_model(config, is_deepspeed=False).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(
    model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of an update with these micro-batches."""
    num_items_in_batch = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    model.zero_grad()
    losses = [model(**batch, num_items_in_batch=num_items_in_batch).loss for batch in batches]
    sum(losses).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return sum(losses).item(), gradients


def unpacked(dataset: ConversationDataset, processor: MGMProcessor) -> list[dict[str, torch.Tensor]]:
    """The samples of ROWS, each by itself."""
    collate = TrainCollator(processor, 1000)
    return [collate([dataset[sample]]) for row in ROWS for sample in row]


def packed(dataset: ConversationDataset, processor: MGMProcessor, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return PackedCollator(processor, 1000)([[dataset[sample] for sample in row] for row in rows])


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


@pytest.mark.parametrize(
    "flags",
    [{"attn_implementation": "eager"}, {}, {"checkpoint_num_layers": 1, "checkpoint_num_mlps": 2}],
    ids=str,
)
def test_packed_equals_unpacked(dataset, flags):
    """Loss and all trained gradients of rows in one batch, and of a batch a row, with those of single samples."""
    model, processor = build_model(**flags), load_processor(StepConfig().model)
    loss, gradients = loss_and_gradients(model, unpacked(dataset, processor))
    assert all(gradient.any() for name, gradient in gradients.items() if not has_no_gradient(name))
    together = [packed(dataset, processor, ROWS)]
    one_by_one = [packed(dataset, processor, [row]) for row in ROWS]
    for batches in (together, one_by_one):
        packed_loss, packed_gradients = loss_and_gradients(model, batches)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(packed_gradients, gradients)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_leaking_is_seen(dataset, attn_implementation):
    """The comparison above fails when samples see each other: positions that run on, or a mask that hides the ends."""
    model, processor = build_model(attn_implementation=attn_implementation), load_processor(StepConfig().model)
    loss, gradients = loss_and_gradients(model, unpacked(dataset, processor))
    batch = packed(dataset, processor, ROWS)
    length = batch["input_ids"].shape[1]
    running_on = batch | {"position_ids": torch.arange(length).expand_as(batch["input_ids"])}
    hidden = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    for broken in (running_on, hidden):
        broken_loss, broken_gradients = loss_and_gradients(model, [broken])
        assert abs(broken_loss / loss - 1) > 1e-3
        assert norm(broken_gradients[name] - gradients[name] for name in gradients) > 0.1 * norm(gradients.values())


@torch.no_grad()
def test_packed_in_eval_mode(dataset, processor, reference_model):
    """The loss in eval mode, where transformers would make a cache, and with one not look for packed samples."""
    batches = unpacked(dataset, processor)
    counts = [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches]
    losses = [reference_model(**batch).loss.item() for batch in batches]
    expected = np.average(losses, weights=counts)
    assert reference_model(**packed(dataset, processor, ROWS)).loss.item() == pytest.approx(expected, rel=1e-5)


def test_log_counts_samples_and_tokens(dataset, processor):
    """RunLog's sums of a packed batch with those of its samples, which have a mask."""
    rows = [[dataset[sample] for sample in row] for row in ROWS]
    samples = [sample for row in rows for sample in row]
    sums = []
    for collator, batches in (
        (TrainCollator(processor, 1000), [[sample] for sample in samples]),
        (PackedCollator(processor, 1000), [rows]),
    ):
        log = SimpleNamespace(window=torch.zeros(3), update_loss=torch.zeros(()), forecast=None)
        for batch in map(BatchCollator(collator), batches):
            RunLog.micro_batch(log, batch, torch.tensor(0.0))
        sums.append(log.window.tolist())
    assert sums[0] == sums[1] and sums[0][1] > sums[0][2] == len(samples)


def test_flash_attention_packs_one_row(tmp_path):
    """Several rows would leak there: transformers looks for packed samples in a single row alone."""
    flags = {"packing": True, "attn_implementation": "flash_attention_2", "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="--packing with flash_attention_2: choose --per_device_train_batch_size 1"):
        TrainConfig(**flags, per_device_train_batch_size=2)
    assert TrainConfig(**flags, per_device_train_batch_size=1).packing


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "gemma4", "smolvlm", "llama"])
def test_whatever_a_processor_makes_per_token_is_packed(name: str) -> None:
    """A packed row's tokens, labels and token types are its samples', one after the other; images in reading order."""
    family = processor_of(name)
    num_images = [0, 0, 0] if name == "llama" else [2, 0, 1]
    samples = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": "<image>\n" * number + f"What is {'it' * (i + 1)}?"},
                {"from": "gpt", "value": f"A {i}."},
            ],
            "images": [Image.new("RGB", (100 + 30 * k, 80), (50 * k, i, 9)) for k in range(number)],
        }
        for i, number in enumerate(num_images)
    ]
    plain, packed = TrainCollator(family, 1000)(samples), PackedCollator(family, 1000)([samples[:2], samples[2:]])
    assert packed.keys() == plain.keys() - {"attention_mask"} | {"position_ids"}
    is_token = plain["attention_mask"].bool()
    lengths = is_token.sum(1).tolist()
    assert packed["input_ids"].shape == (2, max(lengths[0] + lengths[1], lengths[2]))
    for key in per_token(plain):
        if key != "attention_mask":
            tokens = torch.cat([packed[key][0, : sum(lengths[:2])], packed[key][1, : lengths[2]]])
            assert torch.equal(tokens, plain[key][is_token]), key
    for key in set(plain) - set(per_token(plain)) - {"label_positions"}:
        assert torch.equal(packed[key], plain[key]), key
    starts = [0, lengths[0]]
    assert (packed["position_ids"][0] == 0).nonzero().squeeze(1).tolist()[:2] == starts
