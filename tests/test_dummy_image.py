"""A batch of text with a dummy image in it: the vision side runs, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from forked_runs import run
from test_encoding import VISION, processor_of
from tiny_families import FAMILIES, TIMM_FAMILIES, build_tiny_model, write_family

from chat.arguments import find_positions
from data.batching import TrainCollator
from data.dummy_image import needs_dummy_images
from data.packing import PackedCollator
from layers.chunked_loss import IGNORE_INDEX
from models.loading import load_processor
from models.parts import vision_tower


def sample(question: str, reply: str = "A cat.") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"id": "0", "conversations": turns, "images": []}


SAMPLES = [sample("What is it, after all, that is seen there?"), sample("What?"), sample("And now?", "A dog.")]
# With experts, what a token gets depends on the others: they share room, and a loss balances them.
ROUTED = [name for name in VISION if "moe" in name]
# Beside an image, transformers' Mllama lets text without one attend to blank tiles; without any it leaves that out.
ATTENDING = ["mllama"]


@pytest.mark.parametrize("name", [name for name in VISION if name not in (*TIMM_FAMILIES, *ROUTED, *ATTENDING)])
def test_nothing_else_changes(name: str) -> None:
    """Loss and gradients with the image and without; every parameter of the vision side has a gradient of zero."""
    processor, model = processor_of(name), build_tiny_model(FAMILIES[name]()).train()
    losses, gradients = [], []
    for dummy_images in (False, True):
        batch = TrainCollator(processor, 1000, dummy_images=dummy_images)(SAMPLES)
        assert ("pixel_values" in batch) == dummy_images
        model.zero_grad()
        loss = model(**{key: value for key, value in batch.items() if key != "label_positions"}).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for key, gradient in gradients[0].items():
        if gradient is not None:
            assert (gradients[1][key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key
    vision = [f"{key}" for key, module in model.named_modules() if module is vision_tower(model)][0]
    found = {key: value for key, value in gradients[1].items() if key.startswith(vision + ".")}
    assert found and any(gradient is not None for gradient in found.values())
    assert all(gradient is None or not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", VISION)
def test_where_it_stands(name: str) -> None:
    """Behind the shortest row's text, without a label; the text itself is as it was."""
    processor = processor_of(name)
    plain, batch = (TrainCollator(processor, 1000, dummy_images=dummy)(SAMPLES) for dummy in (False, True))
    lengths = plain["attention_mask"].sum(1)
    added = batch["attention_mask"].sum(1) - lengths
    assert added.tolist() == [0, int(added.sum()), 0] and added.sum() > 0
    for row, length in enumerate(lengths):
        assert torch.equal(batch["input_ids"][row, :length], plain["input_ids"][row, :length])
        assert torch.equal(batch["labels"][row, :length], plain["labels"][row, :length])
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert torch.equal(batch["label_positions"], find_positions(processor, batch)["label_positions"])
    assert len(batch["label_positions"]) == len(plain["label_positions"])


def test_a_row_that_is_full() -> None:
    """No text is cut for it, and what is cut without it is cut."""
    processor = processor_of("llava")
    plain, batch = (TrainCollator(processor, 40, dummy_images=dummy)(SAMPLES[:1]) for dummy in (False, True))
    assert plain["input_ids"].shape[1] == 40 and batch["input_ids"].shape[1] == 40 + 16
    assert torch.equal(batch["label_positions"], plain["label_positions"])


def test_packed_rows() -> None:
    """It is part of its sample."""
    batch = PackedCollator(processor_of("llava"), 1000, dummy_images=True)([SAMPLES[:2], SAMPLES[2:]])
    assert (
        batch["pixel_values"].shape[0] == 1
        and (batch["input_ids"] == processor_of("llava").image_token_id).sum() == 16
    )
    assert ((batch["position_ids"] == 0) & (batch["labels"] != IGNORE_INDEX)).sum() == 0


def test_when_it_is_needed() -> None:
    """With several processes, and where some samples have images and some have none."""
    llava = processor_of("llava")
    assert needs_dummy_images(llava, [0, 1, 2], 2)
    assert not needs_dummy_images(llava, [0, 1, 2], 1)
    assert not needs_dummy_images(llava, [1, 2], 2) and not needs_dummy_images(llava, [0, 0], 2)
    assert not needs_dummy_images(load_processor("data/tiny_mgm"), [0, 1], 2), "its forward sees to that"
    assert not needs_dummy_images(processor_of("llama"), [0, 1], 2)
    batch = TrainCollator(llava, 1000, dummy_images=True)(
        [SAMPLES[0] | {"conversations": [{"from": "human", "value": ""}]}]
    )
    assert "pixel_values" in batch, "of a process that is left without a sample"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trained"), [("llava", "multi_modal_projector"), ("qwen2_5_vl", "merger")])
def test_processes_with_images_and_without(name: str, trained: str, mixed_dataset: Path, tmp_path: Path) -> None:
    """Two processes, whose batches of one sample have an image or not, train as one does: DDP, whose projector needs
    a gradient everywhere, and ZeRO-3, which would wait forever."""
    write_family(name, tmp_path / "model", with_weights=True)
    flags = f"--model {tmp_path / 'model'} --dataset {mixed_dataset} --image_folder data/demo --max_steps 3"
    flags += " --eval_dataset data/demo/validation.json --eval_samples 3 --max_new_tokens 3"
    flags += f" --trainable_modules {trained} --lora_dropout 0 --learning_rate 1e-2 --warmup_ratio 0 --logging_steps 1"
    flags += " --per_device_train_batch_size 1 --save_steps 0 --dataloader_num_workers 0 --forecast false"
    losses = []
    strategies = (("single", 1, 4), ("ddp", 2, 2), ("fsdp2", 2, 2), ("zero3", 2, 2))
    for config, num_processes, accumulation in strategies:
        folder = tmp_path / config
        words = f"{flags} --gradient_accumulation_steps {accumulation} --output_dir {folder / 'out'}"
        ended = run(words, folder, config, num_processes)
        assert ended.code == 0, ended.err[-3000:]
        losses.append((ended.result["train_loss"], ended.result["last_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5) and losses[3] == pytest.approx(losses[0], rel=1e-4)
