"""Which samples make up an update, how many label tokens it has, and what a batch holds."""

import itertools
import json
import pickle
import platform
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from forked_runs import run
from PIL import Image
from safetensors.torch import load_file
from tiny_files import load_conversations
from torch.utils.data import DataLoader, Dataset

import data.cache
import data.lengths
from chat.encoding import count_tokens
from chat.messages import messages_for
from data.batching import BatchCollator, TrainCollator, UpdateBatchSampler
from data.dataset import FILLER, open_dataset
from data.demo import ensure_demo
from data.lengths import column_values, measure_lengths
from layers.chunked_loss import IGNORE_INDEX
from models.loading import load_processor
from step import needs_padding_mask
from utils import UserError


NAMES = ("num_tokens", "num_label_tokens")


# num_samples, micro_batch_size, gradient_accumulation_steps, num_processes
SHAPES = [shape for shape in itertools.product((1, 7, 8, 37, 64, 65), (1, 3, 8), (1, 4), (1, 2, 3))]


def make_sampler(
    num_samples: int = 37,
    micro_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    num_processes: int = 1,
    seed: int = 42,
    **kwargs,
) -> UpdateBatchSampler:
    shape = (micro_batch_size, gradient_accumulation_steps, num_processes)
    return UpdateBatchSampler(np.random.default_rng(0).integers(1, 50, num_samples), *shape, seed, **kwargs)


def skewed_lengths(num_samples: int) -> np.ndarray:
    """Mostly short, some very long, as in real data: tokens a sample."""
    return np.random.default_rng(1).lognormal(5, 1, num_samples).astype(int) + 10


def padding_share(micro_batches: Iterable[list[int]], num_tokens: np.ndarray) -> float:
    """Which part of all positions is padding, each micro-batch padded to its longest sample."""
    lengths = [num_tokens[micro_batch] for micro_batch in micro_batches]
    return 1 - sum(map(np.sum, lengths)) / sum(len(batch) * batch.max() for batch in lengths)


def samples_per_update(sampler: UpdateBatchSampler) -> list[list[int]]:
    """What each process's shard yields, put together update by update as a training loop would see it."""
    shards = [
        list(BatchSamplerShard(sampler, sampler.num_processes, rank, even_batches=False))
        for rank in range(sampler.num_processes)
    ]
    assert len({len(shard) for shard in shards}) == 1, "a process would wait for ever"
    steps = sampler.update_size // (sampler.micro_batch_size * sampler.num_processes)
    updates = []
    for start in range(0, len(shards[0]), steps):
        micro_batches = [batch for shard in shards for batch in shard[start : start + steps]]
        updates.append(sorted(index for index in sum(micro_batches, []) if index is not FILLER))
    return updates


@pytest.mark.parametrize("num_samples", [32, 36, 37, 39])
def test_an_update_has_the_same_samples_however_it_is_shared_out(num_samples):
    """1 x 8, 4 x 2 and 2 processes x 4, update by update; the last one too, of which a process may have no sample."""
    expected = samples_per_update(make_sampler(num_samples, 8, 1, 1))
    assert samples_per_update(make_sampler(num_samples, 2, 4, 1)) == expected
    assert samples_per_update(make_sampler(num_samples, 1, 8, 1)) == expected
    assert samples_per_update(make_sampler(num_samples, 4, 1, 2)) == expected
    assert samples_per_update(make_sampler(num_samples, 1, 4, 2)) == expected


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_once_an_epoch(shape, group_by_length):
    """All samples, none twice; micro-batches within their size and never empty. Fillers stand alone, at the end."""
    num_samples, micro_batch_size, _, num_processes = shape
    sampler = make_sampler(*shape, num_tokens=skewed_lengths(num_samples), group_by_length=group_by_length)
    micro_batches = list(sampler)
    num_fillers = micro_batches.count([FILLER])
    assert num_fillers < num_processes and [FILLER] not in micro_batches[: len(micro_batches) - num_fillers]
    assert sorted(sum(micro_batches[: len(micro_batches) - num_fillers], [])) == list(range(num_samples))
    assert all(1 <= len(micro_batch) <= micro_batch_size for micro_batch in micro_batches)
    assert len(micro_batches) % num_processes == 0
    assert len(sampler) == len(micro_batches)
    assert sampler.num_updates() == len(sampler.updates()) == len(sampler.label_tokens_per_update())


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_label_tokens_per_update(shape, group_by_length):
    """The counts with a sum over the samples that the processes really get for each update."""
    sampler = make_sampler(*shape, num_tokens=skewed_lengths(shape[0]), group_by_length=group_by_length)
    expected = [sum(int(sampler.num_label_tokens[i]) for i in update) for update in samples_per_update(sampler)]
    assert sampler.label_tokens_per_update() == expected


def test_only_the_last_update_is_short():
    """All others have micro-batches x accumulation x processes samples."""
    sampler = make_sampler(37, 2, 2, 2)
    assert [len(update) for update in sampler.updates()] == [8, 8, 8, 8, 5]
    assert [len(micro_batch) for micro_batch in list(sampler)[-4:]] == [2, 1, 1, 1]


def test_accelerate_deals_micro_batches_in_turn():
    """Process r of n with every n-th micro-batch from the r-th on."""
    sampler = make_sampler(37, 4, 2, 2)
    for rank in range(2):
        assert list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) == list(sampler)[rank::2]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_epochs_differ_and_seeds_reproduce(group_by_length):
    """The order by epoch and seed: another epoch or seed is another order, the same is the same."""
    num_tokens = skewed_lengths(37)

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = make_sampler(seed=seed, num_tokens=num_tokens, group_by_length=group_by_length)
        sampler.start_at(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 3) == order(1, 3)
    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    sampler = make_sampler()
    assert list(sampler) == list(sampler)


def test_the_order_does_not_touch_the_global_generators():
    """Whoever restores a run's random state is not disturbed by the sampler."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(make_sampler())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_sorting_inside_an_update_keeps_its_samples(num_processes):
    """The same updates with and without lengths; with them micro-batches come longest first and less padded."""
    num_tokens = skewed_lengths(1003)
    plain, by_length = (make_sampler(1003, 4, 8, num_processes, num_tokens=each) for each in (None, num_tokens))
    assert samples_per_update(by_length) == samples_per_update(plain)
    assert all((np.diff(num_tokens[update]) <= 0).all() for update in by_length.updates())
    assert padding_share(list(by_length), num_tokens) < 0.6 * padding_share(list(plain), num_tokens)


def test_processes_get_similar_lengths():
    """The micro-batches of one step, which accelerate deals to two processes: neither waits long for the other."""
    num_tokens = skewed_lengths(1024)

    def waiting(sampler: UpdateBatchSampler) -> int:
        longest = [int(num_tokens[micro_batch].max()) for micro_batch in sampler]
        return sum(abs(a - b) for a, b in zip(longest[::2], longest[1::2], strict=True))

    assert waiting(make_sampler(1024, 4, 8, 2, num_tokens=num_tokens)) < 0.5 * waiting(make_sampler(1024, 4, 8, 2))


def test_group_by_length_cuts_padding():
    """Without accumulation an update is a micro-batch: only grouping updates helps, and it does."""
    num_tokens = skewed_lengths(4000)
    shuffled, grouped = (
        padding_share(make_sampler(4000, 8, num_tokens=num_tokens, group_by_length=flag), num_tokens)
        for flag in (False, True)
    )
    assert shuffled > 0.6 and grouped < 0.2


@pytest.mark.parametrize("num_samples", [5, 37, 400, 4001])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_longest_sample_comes_first(num_samples, epoch):
    """With group_by_length, memory that does not suffice is found out at the first step; later ones are mixed."""
    sampler = make_sampler(num_samples, 4, 2, 2, num_tokens=skewed_lengths(num_samples), group_by_length=True)
    sampler.start_at(epoch)
    longest = [sampler.num_tokens[update].max() for update in sampler.updates()]
    assert longest[0] == sampler.num_tokens.max()
    if num_samples > 100:
        assert (np.diff(longest) > 0).mean() > 0.3


@pytest.fixture
def dataset_path(tmp_path: Path) -> Path:
    """A short text, an image with a long reply, one with a reply of two turns, and two images far apart."""
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    ask, answer = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}
    chat = [{"from": "human", "value": "Name a color."}, {"from": "gpt", "value": "Red."}]
    long = {"from": "gpt", "value": "It is a very long story about a sign. " * 8}
    records = [
        {"id": "chat", "conversations": chat},
        {"id": "long", "image": "red.png", "conversations": [ask, long]},
        {"id": "turns", "image": "red.png", "conversations": [ask, answer, *chat]},
        {"id": "late", "image": ["red.png"] * 2, "conversations": [ask, long, ask, answer]},
        {"id": "question", "conversations": [{"from": "human", "value": "What is written? " * 20}, answer]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("max_length", [10, 40, 64, 100, 1000])
def test_measured_lengths_are_the_processors(dataset_path, processor, max_length):
    """num_tokens and num_label_tokens with a count over what the processor really returns; 0 where it refuses."""
    records = measure_lengths(load_conversations(dataset_path), processor, max_length)
    for record in records:
        whole, _ = processor.tokenize(record["conversations"])
        assert record["num_tokens"] == len(whole)
        try:
            _, labels = processor.tokenize(record["conversations"], max_length)
        except ValueError:
            assert record["num_label_tokens"] == 0, record["id"]
        else:  # the first position is predicted from nothing: it carries no loss
            assert record["num_label_tokens"] == sum(label != IGNORE_INDEX for label in labels[1:]), record["id"]


def random_conversations(number: int) -> list[list[dict]]:
    """Two exchanges each, of characters that tokenizers and templates stumble over."""
    rng = random.Random(0)
    ends = ("", " ", "\n", "<eos>", "<start_of_turn>", "<end_of_turn>\n")

    def text() -> str:
        return "".join(rng.choices("ab \n\t\u2028éü数🙂\u0301<>e\0\ufeff▁", k=rng.randint(0, 40))) + rng.choice(ends)

    def conversation() -> list[dict]:
        images = rng.choice(["", "<image>\n", "<image><image>"]), rng.choice(["", "<image>"])
        asked = [{"from": "human", "value": image + text()} for image in images]
        return [turn for ask in asked for turn in (ask, {"from": "gpt", "value": text()})]

    return [conversation() for _ in range(number)]


@pytest.mark.parametrize("case", ["reference", "tiny", "everything is a target"])
@pytest.mark.parametrize("max_length", [1, 20, 33, 50, 70, 100, 1000])
def test_counts_of_odd_texts_are_the_processors(processor, monkeypatch, case, max_length):
    """count_tokens with lists that processor.tokenize built, for two tokenizers and a template without prompts."""
    processor = load_processor("data/tiny_mgm") if case == "tiny" else processor
    if case == "everything is a target":
        template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        monkeypatch.setattr(processor, "chat_template", "{% generation %}" + template + "{% endgeneration %}")
    conversations = random_conversations(300)
    messages = [messages_for(processor, turns) for turns in conversations]
    num_tokens, num_label_tokens = count_tokens(processor, messages, max_length=max_length)
    for i, turns in enumerate(conversations):
        input_ids, labels = processor.tokenize(turns)
        num_labels = sum(label != IGNORE_INDEX for label in labels[1:max_length])
        expected = len(input_ids), 0 if processor.image_token_id in input_ids[max_length:] else num_labels
        assert (num_tokens[i], num_label_tokens[i]) == expected, turns


@pytest.fixture
def odd_records(tmp_path: Path) -> datasets.Dataset:
    """Fifty conversations that look for images which nobody opens."""
    path = tmp_path / "odd.json"
    conversations = random_conversations(50)
    counts = [sum(turn["value"].count("<image>") for turn in turns) for turns in conversations]
    records = [{"image": ["x"] * n, "conversations": turns} for n, turns in zip(counts, conversations, strict=True)]
    path.write_text(json.dumps(records))
    return load_conversations(path)


def test_lengths_by_several_processes(odd_records, processor, monkeypatch):
    """Two processes with one; what they cached serves any number. The cache holds the two columns alone."""
    messages = [messages_for(processor, turns) for turns in odd_records["conversations"]]
    expected = dict(zip(NAMES, count_tokens(processor, messages, max_length=40), strict=True))
    monkeypatch.setattr(data.lengths, "RECORDS_PER_PROCESS", 25)
    monkeypatch.setattr(data.cache.os, "cpu_count", lambda: 8)
    lengths = measure_lengths(odd_records, processor, 40)
    caches = {Path(file["filename"]) for file in lengths.cache_files}
    assert sorted(path.name.partition("_")[2] for path in caches if "_of_" in path.name) == [
        f"0000{rank}_of_00002.arrow" for rank in range(2)
    ]
    assert (
        len(caches) == 3
        and min(path.stat().st_size for path in caches) < max(path.stat().st_size for path in caches) / 4
    )
    for name in expected:
        assert (column_values(lengths, name) == expected[name]).all()
    monkeypatch.setattr(data.lengths, "RECORDS_PER_PROCESS", 1000)
    monkeypatch.setattr(data.lengths, "count_tokens", lambda *args, **kwargs: pytest.fail("counted again"))
    assert measure_lengths(odd_records, processor, 40)["num_tokens"][:] == lengths["num_tokens"][:]


def test_a_new_version_counts_again(odd_records, processor, monkeypatch):
    """A cache that older code filled is not used once the version of the counts is raised."""
    measure_lengths(odd_records, processor, 41)
    monkeypatch.setattr(data.lengths, "LENGTHS_VERSION", data.lengths.LENGTHS_VERSION + 1)
    monkeypatch.setattr(data.lengths, "count_tokens", lambda *args, **kwargs: pytest.fail("counted again"))
    with pytest.raises(BaseException, match="counted again"):
        measure_lengths(odd_records, processor, 41)


def test_overlong_samples_have_no_label_tokens(dataset_path, processor):
    """At 64 tokens: a cut image and a cut reply count as 0, a reply that is cut in the middle as what is left."""
    records = measure_lengths(load_conversations(dataset_path), processor, 64)
    num_label_tokens = dict(zip(records["id"], records["num_label_tokens"], strict=True))
    assert num_label_tokens["late"] == num_label_tokens["question"] == 0
    assert 0 < num_label_tokens["long"] < 64
    assert num_label_tokens["chat"] > 0


def test_lengths_depend_on_max_length_and_template(dataset_path, processor, monkeypatch):
    """A cached count is not taken for another max_length or chat template."""
    records = load_conversations(dataset_path)
    short, long = (measure_lengths(records, processor, n) for n in (64, 1000))
    assert short["num_label_tokens"] != long["num_label_tokens"]
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace(r"user\n", r"user\n\n"))
    assert measure_lengths(records, processor, 1000)["num_tokens"] != long["num_tokens"]


@pytest.mark.parametrize("error", ["rewrites", "raises"])
def test_a_template_that_fails_is_named_in_one_line(dataset_path, processor, monkeypatch, error):
    """One that changes earlier turns, and one that refuses: the record, and what the template says."""
    if error == "rewrites":
        template = "{% for m in messages %}{{ m.role if loop.last }}{{ m.content[-1].text }};{% endfor %}"
    else:
        template = "{{ raise_exception('no such turns') }}"
    monkeypatch.setattr(processor, "chat_template", template)
    records = load_conversations(dataset_path)
    reason = "rewrites earlier turns, .* mark them in it" if error == "rewrites" else "no such turns"
    with pytest.raises(UserError, match=f"record .*: the model's chat template fails: .*{reason}"):
        measure_lengths(records, processor, 1000)


def test_collator(dataset_path, processor, reference_model):
    """A collated batch with the processor's own, the image positions, and what a loader's worker sends."""
    dataset = open_dataset(dataset_path)
    samples = [dataset[0], dataset[2]]
    collate = TrainCollator(processor, 100)
    batch = collate(samples)
    expected = processor(
        conversations=[sample["conversations"] for sample in samples],
        images=[sample["images"] for sample in samples],
        max_length=100,
        padding_side="right",
    )
    assert batch.keys() == {*expected.keys(), "image_positions", "label_positions"}
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
    assert batch["image_positions"].shape == (16,)
    assert (batch["input_ids"].flatten()[batch["image_positions"]] == processor.image_token_id).all()
    (sent,) = DataLoader(dataset, batch_sampler=[[0, 2]], collate_fn=collate, num_workers=1)
    torch.testing.assert_close(sent, batch)  # a worker has a thread of its own: pixels within rounding
    assert reference_model(**batch).loss.isfinite()


@torch.no_grad()
def test_sum_of_micro_batch_losses_is_the_updates_mean(dataset_path, processor, reference_model):
    """The loss of one batch of all samples with the sum over micro-batches, each over the update's label tokens."""
    dataset = open_dataset(dataset_path)
    records = measure_lengths(dataset.records, processor, 1000)
    collate = TrainCollator(processor, 1000)
    sampler = UpdateBatchSampler(column_values(records, "num_label_tokens"), 2, 4, 1, seed=0)
    (num_items,) = sampler.label_tokens_per_update()
    losses = [
        reference_model(**collate([dataset[i] for i in micro_batch]), num_items_in_batch=num_items).loss.item()
        for micro_batch in sampler
    ]
    assert len(losses) == 3
    whole = reference_model(**collate([dataset[i] for i in range(5)])).loss.item()
    assert sum(losses) == pytest.approx(whole, rel=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mends what glibc does")
def test_freed_memory_is_returned():
    """In a process of its own, two hundred megabytes in buffers of a view's size, all but the last freed."""
    code = """
import psutil, torch
from data.batching import BatchCollator, return_freed_memory
torch.ones(5_000_000)  # freed: from now on glibc takes such buffers from its heap
before = psutil.Process().memory_info().rss
buffers = [torch.ones(1_000_000) for _ in range(50)]
del buffers[:-1]
kept = psutil.Process().memory_info().rss - before
return_freed_memory()
print(kept, psutil.Process().memory_info().rss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 150e6, "glibc needs no help any more"
    assert left < 30e6


def test_going_on_in_an_epoch_opens_nothing_before():
    """The rest of the epoch is what it would have been, and no sample of the updates before is asked for."""
    sampler = UpdateBatchSampler(np.arange(1, 24), 2, 2, 1, seed=42)
    sampler.start_at(3)
    whole = list(sampler)
    sampler.start_at(3, 2)
    opened = []

    class Samples(Dataset):
        def __getitem__(self, index: int) -> int:
            opened.append(index)
            return index

    loader = DataLoader(Samples(), batch_sampler=sampler, collate_fn=list)
    assert list(loader) == whole[4:] and opened == sum(whole[4:], [])
    assert len(loader) == len(whole) - 4
    assert sampler.digest() != UpdateBatchSampler(np.arange(2, 25), 2, 2, 1, seed=42).digest()


def test_first_micro_batches_know_the_rest():
    """Each process's first micro-batch of an update has the samples of its others."""
    micro_batches = list(UpdateBatchSampler(np.ones(12), 1, 3, 2, seed=42))
    assert [batch.others is None for batch in micro_batches] == ([False] * 2 + [True] * 4) * 2
    assert micro_batches[1].others == micro_batches[3] + micro_batches[5]
    assert pickle.loads(pickle.dumps(micro_batches[1])).others == micro_batches[1].others


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", " --packing --max_seq_len 64", " --on_bad_sample skip"])
def test_an_epochs_last_sample_is_trained_on(flags: str, tmp_path: Path) -> None:
    """Seven samples, an update of four and one of three: two processes end as one does, with the help of a filler."""
    demo = ensure_demo()
    (tmp_path / "seven.json").write_text(json.dumps(json.loads((demo / "train.json").read_text())[:7]))
    flags += f" --dataset {tmp_path / 'seven.json'} --image_folder {demo} --eval_samples 0 --lora_dropout 0"
    flags += (
        " --per_device_train_batch_size 1 --dataloader_num_workers 0 --no_rehearse --learning_rate 1e-3 --save_steps 0"
    )
    results, adapters = {}, {}
    strategies = (("single", 1, 4), ("ddp", 2, 2), ("fsdp2", 2, 2), ("zero3", 2, 2))
    for config, num_processes, accumulation in strategies:
        folder = tmp_path / config
        words = f"{flags} --gradient_accumulation_steps {accumulation} --output_dir {folder / 'out'}"
        ended = run(words, folder, config, num_processes)
        assert ended.code == 0, ended.err[-2000:]
        results[config] = ended.result
        adapters[config] = load_file(folder / "out/adapter_model.safetensors")
    for config in ("ddp", "fsdp2", "zero3"):
        for key in ("global_step", "train_loss", "last_loss"):
            assert results[config][key] == pytest.approx(results["single"][key], rel=1e-4), (config, key)
        for name, tensor in adapters[config].items():
            assert (tensor - adapters["single"][name]).abs().max() < 1e-3, (config, name)


def test_a_needless_mask_is_left_out():
    """But not where padding stands before a row's tokens, nor for a model that reads it."""
    behind, before = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    for mask, keeps_mask, expected in ((behind, False, False), (before, False, True), (behind, True, True)):
        collate = BatchCollator(lambda _, mask=mask: {"attention_mask": mask}, keeps_mask)
        assert ("attention_mask" in collate([]).inputs) == expected
    assert collate([]).inputs["attention_mask"].equal(behind)


def test_which_steps_need_a_mask(monkeypatch):
    """In bf16 none does, unless its model reads the mask."""
    monkeypatch.setattr("step.reads_padding_mask", lambda config: config.model_type == "mllama")
    monkeypatch.setattr("step.load_config", lambda model: SimpleNamespace(model_type=model))
    for model, mixed_precision, expected in (
        ("gemma", "bf16", False), ("gemma", "fp16", True), ("gemma", "no", True), ("mllama", "bf16", True)
    ):  # fmt: skip
        assert needs_padding_mask(SimpleNamespace(model=model, mixed_precision=mixed_precision)) == expected


def test_tokens_and_samples_are_counted():
    """With a mask, packed, and where the mask has been left out."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    for keeps_mask in (True, False):
        batch = BatchCollator(lambda _: {"attention_mask": mask.clone()}, keeps_mask)([{"id": "a"}, {}])
        assert (batch.num_samples, batch.num_tokens, batch.sample_ids) == (2, 4, ["a"])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    batch = BatchCollator(lambda _: {"position_ids": positions})([[{}, {}], [{}]])
    assert (batch.num_samples, batch.num_tokens) == (3, 7)
