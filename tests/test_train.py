"""train.py as users start it: every strategy gives the same run, and bad input ends in one line."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import forked_runs
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import has_no_gradient
from forked_runs import run
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluation
import step
import train
from data.batching import TrainCollator, UpdateBatchSampler
from data.dataset import open_dataset
from data.demo import ensure_demo
from data.loader import build_loader
from data.worst_case import Row, worst_case_batch
from memory.config import ProbeConfig
from memory.disk import checkpoint_bytes, output_bytes
from memory.trace import trained_shapes
from models.loading import load_model, load_processor
from models.lora import trained_parameters
from training.config import SCHEDULERS
from utils import UserError, parse_config, run_script


ROOT = Path(__file__).parent.parent
MODEL = "data/tiny_mgm"
NUM_STEPS = 5
# Eight samples an update, however they are shared out.
STRATEGIES = {
    "single-8x1": ("single", 1, 8, 1),
    "single-4x2": ("single", 1, 4, 2),
    "ddp-2-processes": ("ddp", 2, 1, 4),
    "fsdp2-2-processes": ("fsdp2", 2, 1, 4),
    "zero2": ("zero2", 1, 4, 2),
    "zero2-2-processes": ("zero2", 2, 1, 4),
    "zero3": ("zero3", 1, 4, 2),
    "zero3-2-processes": ("zero3", 2, 1, 4),
}

# Every update has the whole data set: in 8 rows of 200 tokens, or in 40 samples.
EPOCH_FLAGS = "--num_train_epochs 3 --max_seq_len 200 --logging_steps 1 --eval_samples 0 --lora_dropout 0"
EPOCH_FLAGS += " --max_grad_norm 0.1 --learning_rate 4e-3 --image_folder data/demo"


@pytest.fixture(scope="module")
def mixed_dataset(tmp_path_factory) -> Path:
    """Every other record is text only, so that one process often has an image where the other has none."""
    records = json.loads((ensure_demo() / "train.json").read_text())[:40]
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    path = tmp_path_factory.mktemp("data") / "mixed.json"
    path.write_text(json.dumps(records))
    return path


def launch(config: str, num_processes: int, *flags: str) -> tuple[dict, str]:
    """Run train.py under a launch config, by name or path without .yaml; returns the last line's JSON and stderr."""
    command = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += ["--num_processes", str(num_processes), "train.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def runs(mixed_dataset, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """The same five updates under every strategy, without dropout, clipped hard."""
    folder = tmp_path_factory.mktemp("runs")
    results = {}
    for name, (config, num_processes, micro_batch_size, accumulation) in STRATEGIES.items():
        flags = f"--per_device_train_batch_size {micro_batch_size} --gradient_accumulation_steps {accumulation}"
        flags += f" --max_steps {NUM_STEPS} --logging_steps 1 --eval_samples 8 --lora_dropout 0 --max_grad_norm 0.1"
        flags += " --learning_rate 4e-3"
        flags += f" --dataset {mixed_dataset} --image_folder data/demo --eval_dataset data/demo/validation.json"
        flags += f" --output_dir {folder / name}"
        results[name] = folder / name, launch(config, num_processes, *flags.split())[0]
    return results


def scalars(output_dir: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(output_dir / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.mark.slow
def test_strategies_agree(runs):
    """Loss and gradient norm of each of five clipped updates, every strategy against a single process."""
    reference = runs["single-8x1"][0]
    assert min(scalars(reference, "train/grad_norm")) > 0.1, "clipping has to bite, else it is not tested"
    for name, (output_dir, _) in runs.items():
        for tag in ("train/loss", "train/grad_norm"):
            values = scalars(output_dir, tag)
            assert len(values) == NUM_STEPS
            assert values == pytest.approx(scalars(reference, tag), abs=1e-4, rel=1e-4), (name, tag)


@pytest.mark.slow
def test_fsdp2_splits(runs):
    """Each of two processes holds half of the weights, of what is trained and of its optimizer state."""
    whole, split = (runs[name][1] for name in ("ddp-2-processes", "fsdp2-2-processes"))
    assert split["environment"]["distributed_type"] == "FSDP"
    for key in ("weights_bytes", "trained_bytes", "gradients_bytes", "optimizer_bytes"):
        measured = [result["memory"]["measured"][key] for result in (whole, split)]
        assert measured[1] == pytest.approx(measured[0] / 2, rel=0.01), key


@pytest.mark.slow
def test_processes_differ_in_images(mixed_dataset):
    """The agreement above covers steps in which one process has an image and the other has none."""
    has_image = ["image" in record for record in json.loads(mixed_dataset.read_text())]
    micro_batches = list(UpdateBatchSampler(torch.ones(len(has_image)).numpy(), 1, 4, 2, seed=42))
    assert any(has_image[a] != has_image[b] for [a], [b] in zip(micro_batches[::2], micro_batches[1::2], strict=True))


@pytest.mark.slow
def test_first_loss_is_mean_over_label_tokens(runs, mixed_dataset):
    """The first update's loss, against a mean over all its label tokens worked out by hand."""
    processor = load_processor(MODEL)
    model = load_model(MODEL, torch.float32, "sdpa").eval()
    dataset = open_dataset(mixed_dataset, "data/demo")
    first = UpdateBatchSampler(torch.ones(len(dataset)).numpy(), 8, 1, 1, seed=42).updates()[0]
    loss_sum, num_label_tokens = 0.0, 0
    for index in first:
        batch = TrainCollator(processor, 2048)([dataset[index]])
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            loss_sum += model(**batch).loss.item() * count
        num_label_tokens += count
    assert scalars(runs["single-8x1"][0], "train/loss")[0] == pytest.approx(loss_sum / num_label_tokens, abs=1e-5)


@pytest.mark.slow
def test_adapters_load_and_merge(runs):
    """Every strategy saves the same adapter, which PEFT loads onto its base and merges."""
    reference = load_file(runs["single-8x1"][0] / "adapter_model.safetensors")
    for name, (output_dir, _) in runs.items():
        adapter = load_file(output_dir / "adapter_model.safetensors")
        assert adapter.keys() == reference.keys()
        for key, value in adapter.items():
            if has_no_gradient(key):
                continue
            torch.testing.assert_close(value, reference[key], atol=2e-3, rtol=1e-2, msg=f"{name}: {key}")
        assert any("multi_modal_projector" in key for key in adapter)
        assert not any("vision_tower" in key for key in adapter), "LoRA belongs to the language model alone"

    output_dir = runs["zero3-2-processes"][0]
    base_name = json.loads((output_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = load_model(base_name, torch.float32, "sdpa")
    names = base.state_dict().keys()
    model = PeftModel.from_pretrained(base, output_dir).eval()
    inputs = {"input_ids": torch.tensor([[2, 4, 20, 21, 22]])}
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == names


@pytest.mark.slow
def test_run_json_and_tensorboard(runs):
    """The contract's keys and tags, in the last line, in run.json and in the event files; the model card."""
    output_dir, result = runs["zero3"]
    assert json.loads((output_dir / "run.json").read_text()) == result
    keys = "status global_step train_loss last_loss total_params trainable_params samples_per_second"
    keys += " tokens_per_second skipped_updates bad_samples cut_replies peak eval data config environment memory speed"
    assert list(result) == keys.split()
    assert result["status"] == "done" and result["global_step"] == NUM_STEPS
    assert result["last_loss"] == pytest.approx(scalars(output_dir, "train/loss")[-1], abs=1e-5)
    assert set(result["peak"]) == {"load", "train", "eval"}
    card = ModelCard.load(output_dir / "README.md")
    assert card.data.library_name == "peft" and MODEL in card.text
    model = load_model(MODEL, torch.float32, "sdpa")
    num_lora = sum(v.numel() for k, v in load_file(output_dir / "adapter_model.safetensors").items() if "lora_" in k)
    assert result["total_params"] == sum(p.numel() for p in model.parameters()) + num_lora

    events = EventAccumulator(str(output_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    scalar_tags = ["loss", "learning_rate", "grad_norm", "tokens_per_second"]
    assert {f"train/{tag}" for tag in scalar_tags} | {"memory/rss_bytes", "eval/exact_match"} <= set(tags["scalars"])
    assert {"config/text_summary", "eval/predictions/text_summary"} <= set(tags["tensors"])
    assert "eval/sample_0" in tags["images"]
    assert any("hparams" in tag for tag in events.summary_metadata), "hparams plugin"


def assert_disk_is_predicted(output_dir: Path, result: dict, weights: str, **flags: int) -> None:
    """The last checkpoint and the weights' file, within 3 % of what is predicted without the run."""
    checkpoint = output_dir / f"checkpoint-{result['global_step']}"
    written = sum(path.stat().st_size for path in checkpoint.iterdir())
    shapes = trained_shapes(ProbeConfig(model=MODEL, mode="predict", **flags))
    num_processes = result["environment"]["num_processes"]
    assert checkpoint_bytes(shapes, "adamw_torch", num_processes) == pytest.approx(written, rel=0.03)
    num_trained, num_params = result["trainable_params"], result["total_params"]
    num_frozen = 0 if result["config"]["lora_r"] else num_params - num_trained
    is_deepspeed = result["environment"]["distributed_type"] == "DEEPSPEED"
    predicted = output_bytes(num_trained, num_frozen, result["config"]["mixed_precision"], is_deepspeed)
    assert predicted == pytest.approx((output_dir / weights).stat().st_size, rel=0.03)


@pytest.mark.slow
def test_the_disk_is_predicted(runs):
    """Under every strategy, for one process and for two."""
    for output_dir, result in runs.values():
        assert_disk_is_predicted(output_dir, result, "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "num_processes"), [("single", 1), ("fsdp2", 2), ("zero3", 1)])
def test_full_fine_tuning_saves_a_model(config, num_processes, mixed_dataset, tmp_path):
    """--lora_r 0 trains the language model, leaves the towers alone and saves an ordinary model."""
    flags = f"--lora_r 0 --max_steps 2 --eval_samples 0 --dataset {mixed_dataset} --image_folder data/demo"
    flags += (
        f" --learning_rate 1e-3 --per_device_train_batch_size {32 // num_processes} --output_dir {tmp_path / 'out'}"
    )
    result, _ = launch(config, num_processes, *flags.split())
    base, tuned = load_model(MODEL, torch.float32, "sdpa"), load_model(str(tmp_path / "out"), torch.float32, "sdpa")
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert "model.language_model.embed_tokens.weight" in changed
    if config != "zero3":  # whose names are those of the original weights
        names = load_file(tmp_path / "out/model.safetensors").keys()
        assert names == dict(base.named_parameters()).keys(), "a tied weight once"
    assert not any("vision_tower" in name for name in changed)
    assert_disk_is_predicted(tmp_path / "out", result, "model.safetensors", lora_r=0)
    assert result["trainable_params"] == sum(
        p.numel() for name, p in base.named_parameters() if "vision_tower" not in name
    )


def adapted(**flags: object) -> PeftModel:
    """The tiny model with an adapter whose tensors are as if trained, in evaluation mode."""
    model = step.build_model(step.StepConfig(**({"model": MODEL, "mixed_precision": "no"} | flags)), False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def test_all_linear_is_the_language_models(tmp_path):
    """LoRA on all 28 linear layers of the language model, on none of towers, projector, mining and head; it comes back
    from its folder."""
    model = adapted(lora_target_modules=["all-linear"])
    layers = {path.partition(".lora_A")[0] for path in dict(model.named_modules()) if path.endswith("lora_A")}
    linear = {
        f"base_model.model.{path}"
        for path, module in load_model(MODEL, torch.float32, "sdpa").named_modules()
        if isinstance(module, torch.nn.Linear) and ".language_model." in path
    }
    assert layers == linear and len(layers) == 28
    assert_comes_back(model, tmp_path)


def trained_in_full(**flags) -> tuple[set[str], list[str]]:
    """The names of what is trained without LoRA's own, as the base model has them, and what build_model says."""
    lines: list[str] = []
    config = step.StepConfig(model=MODEL, mixed_precision="no", **flags)
    model = step.build_model(config, is_deepspeed=False, report=lines.append)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    return {name.replace("modules_to_save.default.", "").removeprefix("base_model.model.") for name in names}, lines


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["norm"], "model.language_model.norm"),
        (["language_model.norm"], "model.language_model.norm"),
        (["vision_tower"], "model.vision_tower"),
        (["encoder.layers"], "model.vision_tower.encoder.layers.0, model.vision_tower.encoder.layers.1"),
        (["patch_info_mining", "query_proj"], "model.patch_info_mining"),
        (["layernorm", "mlp.fc1", "linear_1"], "and "),
    ],
    ids=["norm", "a longer end", "a tower", "a list", "one inside another", "many"],
)
def test_the_same_modules_with_lora_and_without(names, expected):
    """Those whose path ends with the name, and no other whose name merely ends so; what they are is said."""
    alone, said_alone = trained_in_full(lora_r=0, trainable_modules=names)
    beside, said_beside = trained_in_full(lora_r=4, trainable_modules=names)
    assert alone == beside and said_alone == said_beside
    assert said_alone[0].startswith("Trained in full: ") and expected in said_alone[0] and len(said_alone[0]) < 500
    if expected.startswith("model."):
        assert all(name.startswith(tuple(expected.split(", "))) for name in alone)


ALL_PARTS = ["vision_tower", "vision_tower_aux", "patch_info_mining", "multi_modal_projector", "language_model.norm"]


@pytest.mark.parametrize(
    "flags",
    [{}, {"lora_r": 0}, {"lora_r": 0, "trainable_modules": ["model", "lm_head"]}, {"trainable_modules": ALL_PARTS}]
    + [{"lora_bias": "all"}, {"lora_bias": "all", "trainable_modules": ALL_PARTS}, {"lora_bias": "lora_only"}],
    ids=str,
)
@pytest.mark.parametrize("images_per_sample", [0, 1])
def test_what_is_trained_gets_a_gradient(flags, images_per_sample):
    """All of it, with an image and without, as DDP needs it. What cannot have one is not trained, and that is said."""
    config = step.StepConfig(model=MODEL, mixed_precision="no", max_seq_len=64, **flags)
    lines: list[str] = []
    model = step.build_model(config, is_deepspeed=False, report=lines.append).train()
    batch = worst_case_batch(load_processor(MODEL), config, Row(64, images_per_sample))
    model(**batch).loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    asked_for_the_tower = flags.get("lora_bias") == "all" or {"model", "vision_tower"} & {
        *flags.get("trainable_modules", [])
    }
    unused = "Not trained, because the loss does not depend on it: model.vision_tower.encoder.layers.2, "
    assert [line for line in lines if "Not trained" in line] == (
        [unused + "model.vision_tower.post_layernorm"] if asked_for_the_tower else []
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--trainable_modules vision_tower multi_modal_projector", "--lora_bias all"])
@pytest.mark.parametrize(
    ("config", "num_processes"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 1)]
)
def test_unused_parameters_under_every_strategy(config, num_processes, flags, tmp_path):
    """Two processes train what one does: DDP does not wait for what has no gradient."""
    flags = f"{flags} --max_steps 2 --eval_samples 0 --per_device_train_batch_size 2 --dataloader_num_workers 0"
    ended = run(f"{flags} --output_dir {tmp_path / 'out'}", tmp_path, config, num_processes)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("Not trained, because the loss does not depend on it") == 1
    trained = PeftModel.from_pretrained(load_model(MODEL, torch.float32, "sdpa"), tmp_path / "out").merge_and_unload()
    layers = [model.model.vision_tower.encoder.layers for model in (trained, load_model(MODEL, torch.float32, "sdpa"))]
    assert [torch.equal(*(layer.mlp.fc1.bias for layer in pair)) for pair in zip(*layers, strict=True)] == [0, 0, 1]


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    """alpha / sqrt(r) instead of alpha / r: 32 / 4 instead of 32 / 16."""
    scalings = {}
    for use_rslora in (False, True):
        model = adapted(use_rslora=use_rslora)
        layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
        scalings[use_rslora] = layer.scaling["default"]
    assert scalings == {False: 2.0, True: 8.0}
    assert_comes_back(model, tmp_path)


def test_dora_trains_the_rows_lengths(tmp_path):
    """A magnitude for each output of each layer, in fp32; before training the model is the base."""
    config = step.StepConfig(model=MODEL, mixed_precision="no", use_dora=True)
    model = step.build_model(config, is_deepspeed=False).eval()
    magnitudes = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 4 * 3 and all(p.requires_grad and p.dtype == torch.float32 for p in magnitudes.values())
    base = load_model(MODEL, torch.float32, "sdpa").eval()
    lengths = base.model.language_model.layers[0].self_attn.v_proj.weight.norm(dim=1)
    first = next(p for name, p in magnitudes.items() if "layers.0.self_attn.v_proj" in name)
    torch.testing.assert_close(first.data, lengths.data)
    inputs = {"input_ids": torch.tensor([[2, 4, 20, 21, 22]])}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert_comes_back(adapted(use_dora=True), tmp_path)


def assert_comes_back(model: PeftModel, folder: Path) -> None:
    """What is saved gives the same logits from its folder, and others than the base."""
    model.save_pretrained(folder)
    inputs = {"input_ids": torch.tensor([[2, 4, 20, 21, 22]])}
    base = load_model(MODEL, torch.float32, "sdpa").eval()
    with torch.no_grad():
        expected, plain = model(**inputs).logits, base(**inputs).logits
        loaded = PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected)
    assert (plain - expected).abs().max() > 1e-2


@pytest.fixture
def splitting_zero3(tmp_path) -> str:
    """zero3.yaml, but so that every weight is split: the tiny model's would all stay whole."""
    deepspeed_config = json.loads((ROOT / "accelerate_configs/deepspeed_zero3.json").read_text())
    deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed_config))
    launch_config = (ROOT / "accelerate_configs/zero3.yaml").read_text()
    launch_config = launch_config.replace("accelerate_configs/deepspeed_zero3.json", str(tmp_path / "deepspeed.json"))
    (tmp_path / "zero3.yaml").write_text(launch_config)
    return str(tmp_path / "zero3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "num_layers", "num_mlps"),
    [("--lora_r 16", 1, 2), ("--lora_target_modules all-linear", 1, 2), ("--lora_r 0", 0, 3)],
)
def test_parts_recomputed_where_weights_are_gathered(
    trained, num_layers, num_mlps, splitting_zero3, mixed_dataset, tmp_path
):
    """Frozen MLPs, adapted ones and trained ones, also that of the first layer, which ZeRO-3 does not gather as a
    whole: loss and gradient norm of three updates are those of a single process that recomputes nothing."""
    flags = f"{trained} --lora_dropout 0 --max_steps 3 --logging_steps 1 --eval_samples 0 --dataset {mixed_dataset}"
    flags += " --image_folder data/demo --mlp_tiles 2"
    plain = f"--no_gradient_checkpointing --per_device_train_batch_size 8 --output_dir {tmp_path / 'plain'}"
    launch("single", 1, *flags.split(), *plain.split())
    flags += f" --checkpoint_num_layers {num_layers} --checkpoint_num_mlps {num_mlps}"
    for name, config, num_processes in (("zero3", splitting_zero3, 1), ("fsdp2", "fsdp2", 2)):
        rows = f"--per_device_train_batch_size {8 // num_processes} --output_dir {tmp_path / name}"
        launch(config, num_processes, *flags.split(), *rows.split())
        for tag in ("train/loss", "train/grad_norm"):
            expected, found = (scalars(tmp_path / folder, tag) for folder in ("plain", name))
            assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4), (name, tag)


@pytest.fixture
def reading_once(tmp_path) -> str:
    """fsdp2.yaml, but so that the first process alone reads the weights."""
    launch_config = (ROOT / "accelerate_configs/fsdp2.yaml").read_text()
    key = "fsdp_cpu_ram_efficient_loading"
    (tmp_path / "fsdp2.yaml").write_text(launch_config.replace(f"{key}: false", f"{key}: true "))
    return str(tmp_path / "fsdp2")


@pytest.mark.slow
def test_dora_where_weights_are_gathered(splitting_zero3, reading_once, mixed_dataset, tmp_path):
    """DoRA reads whole weights outside their layers' own forward. Two processes under ZeRO-3 and FSDP2 agree with a
    single process, and save an adapter that loads."""
    flags = "--use_dora --lora_target_modules all-linear --lora_dropout 0 --max_steps 3 --logging_steps 1"
    flags += f" --eval_samples 0 --learning_rate 4e-3 --dataset {mixed_dataset} --image_folder data/demo"
    losses = []
    runs = (("one", "single", 1), ("zero3", splitting_zero3, 2), ("fsdp2", reading_once, 2))
    for name, config, num_processes in runs:
        rows = f"--per_device_train_batch_size {8 // num_processes} --output_dir {tmp_path / name}"
        launch(config, num_processes, *flags.split(), *rows.split())
        losses.append(scalars(tmp_path / name, "train/loss"))
    one, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name, *_ in runs)
    for (name, *_), adapter, found in zip(runs[1:], others, losses[1:], strict=True):
        assert len(found) == 3 and found == pytest.approx(losses[0], abs=1e-4, rel=1e-4), name
        assert one.keys() == adapter.keys() and sum("lora_magnitude_vector" in key for key in adapter) == 28, name
        PeftModel.from_pretrained(load_model(MODEL, torch.float32, "sdpa"), tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "num_processes", "rows"), [("single", 1, 8), ("ddp", 2, 4), ("fsdp2", 2, 2), ("zero3", 2, 1)]
)
def test_packed_updates_are_the_unpacked(config, num_processes, rows, mixed_dataset, whole_epochs, tmp_path):
    """An update of all samples, three times: loss and gradient norm with those of a padded batch in one process."""
    accumulation = 8 // (rows * num_processes)
    flags = f"{EPOCH_FLAGS} --dataset {mixed_dataset} --packing --per_device_train_batch_size {rows}"
    flags += f" --gradient_accumulation_steps {accumulation} --output_dir {tmp_path / 'out'}"
    result, _ = launch(config, num_processes, *flags.split())
    assert result["global_step"] == 3
    for tag in ("train/loss", "train/grad_norm"):
        expected = scalars(whole_epochs[0], tag)
        assert scalars(tmp_path / "out", tag) == pytest.approx(expected, abs=1e-4, rel=1e-4), tag
    assert scalars(tmp_path / "out", "train/tokens_per_second")[-1] > 0
    assert result["samples_per_second"] > 0


@pytest.fixture(scope="module")
def whole_epochs(mixed_dataset, tmp_path_factory) -> tuple[Path, dict]:
    """Three updates of all 40 samples in a padded batch, without dropout."""
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    flags = f"{EPOCH_FLAGS} --dataset {mixed_dataset} --per_device_train_batch_size 40 --output_dir {output_dir}"
    return output_dir, launch("single", 1, *flags.split())[0]


def test_the_demos_recipe(monkeypatch, tmp_path):
    """Without --dataset, typed or in a recipe, the demo's batch and learning rate, from any folder; else never."""
    monkeypatch.chdir(tmp_path)

    def values(*argv: str) -> tuple[int, float]:
        config = parse_config(train.TrainConfig, [*argv])
        return config.per_device_train_batch_size, config.learning_rate

    (tmp_path / "rows.yaml").write_text("dataset: null\nper_device_train_batch_size: 4\n")
    (tmp_path / "data.yaml").write_text("dataset: my.json\n")
    assert values() == (32, 4e-3)
    assert values("--recipe", "rows.yaml") == (4, 4e-3)
    assert values("--recipe", "rows.yaml", "--learning_rate", "1e-3") == (4, 1e-3)
    assert values("--dataset", "my.json") == values("--recipe", "data.yaml") == (1, 2e-4)


@pytest.mark.slow
def test_the_demo_run_names_its_recipe(tmp_path):
    """Once, and the result has its values; the run goes on with the same command."""
    flags = f"--max_steps 1 --eval_samples 0 --no_rehearse --dataloader_num_workers 0 --output_dir {tmp_path / 'out'}"
    for resumed in ("", " --max_steps 1 --resume_from_checkpoint latest"):
        ended = run(flags + " --save_steps 1" + resumed, tmp_path)
        assert ended.code == 0, ended.err[-3000:]
        assert ended.out.count("recipes/demo.yaml") == (not resumed)
        config = ended.result["config"]
        assert (config["per_device_train_batch_size"], config["learning_rate"]) == (32, 4e-3)
    ended = run(f"{flags} --resume_from_checkpoint latest --dataset data/demo/train.json", tmp_path)
    assert ended.code == 2 and "learning_rate was 0.004, now 0.0002" in ended.error


def fail(capsys, monkeypatch, *flags: str) -> str:
    """Run train.py's main in this process; returns its one line on stderr after exit code 2."""
    for state in (AcceleratorState, PartialState):
        state._reset_state(True) if state is AcceleratorState else state._reset_state()
    GradientState._reset_state()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        run_script(train.main, train.TrainConfig)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def dataset_of(tmp_path: Path, **changes) -> str:
    record = {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    record["conversations"].append({"from": "gpt", "value": "This."})
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record | changes]))
    return str(path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora_r -1", ["--lora_r -1", "at least 0"]),
        ("--lora_r many", ["lora_r", "many"]),
        ("--lora 8", ["--lora", "--help"]),
        ("--model no/such/folder", ["no/such/folder", "no such folder"]),
        ("--model data", ["--model data", "cannot be loaded"]),
        ("--max_seq_len 2049", ["--max_seq_len 2049", "has 2048 positions", "choose --max_seq_len 2048 or less"]),
        ("--dataset missing.json", ["missing.json", "no such file"]),
        ("--image_folder missing", ["--image_folder missing", "no such folder"]),
        ("--lora_target_modules out_proj", ["--lora_target_modules out_proj", "q_proj"]),
        ("--lora_target_modules mlp", ["--lora_target_modules mlp", "down_proj", "or all-linear"]),
        ("--lora_target_modules all-linear q_proj", ["--lora_target_modules all-linear", "leave out q_proj"]),
        ("--lora_r 0 --use_dora", ["--use_dora True", "--lora_r 0", "a rank above 0"]),
        ("--lora_r 0 --use_rslora", ["--use_rslora True", "a rank above 0"]),
        ("--lora_r 0 --quantize nf4", ["--quantize nf4", "a rank above 0"]),
        ("--quantize int8", ["--quantize int8", "none, nf4"]),
        ("--quantize nf4 --trainable_modules mlp", ["--trainable_modules mlp", "leave out --quantize"]),
        ("--trainable_modules nothing", ["--trainable_modules nothing"]),
        ("--trainable_modules act_fn", ["--trainable_modules act_fn", "no such module"]),
        ("--trainable_modules language_model", ["--trainable_modules language_model", "has LoRA in it", "--lora_r 0"]),
        ("--trainable_modules self_attn", ["--trainable_modules self_attn", "layers.0.self_attn has LoRA in it"]),
        ("--trainable_modules q_proj", ["--trainable_modules q_proj", "has LoRA in it", "--lora_r 0"]),
        ("--trainable_modules lm_head", ["--trainable_modules lm_head", "shares its weight", "--lora_r 0"]),
        ("--trainable_modules embed_tokens", ["--trainable_modules embed_tokens", "shares its weight", "--lora_r 0"]),
        ("--lora_r 0 --trainable_modules post_layernorm", ["post_layernorm", "nothing is left to train"]),
        ("--mixed_precision fp16", ["--mixed_precision fp16", "no GPU"]),
        ("--mixed_precision fp8", ["--mixed_precision fp8", "choose one of"]),
        ("--max_seq_len 4", ["--max_seq_len 4", "choose a larger one"]),
        ("--optim lion", ["--optim lion", "adamw_torch, sgd"]),
        ("--lr_scheduler_type sometimes", ["--lr_scheduler_type sometimes", "cosine"]),
        ("--lr_scheduler_type cosine_with_min_lr", ["--lr_scheduler_type cosine_with_min_lr", "cosine, "]),
        ("--lr_scheduler_type polynomial --learning_rate 1e-8", ["--learning_rate 1e-08", "start above"]),
        ("--checkpoint_num_layers 2 --no_gradient_checkpointing", ["--checkpoint_num_layers 2", "leave one of them"]),
        ("--checkpoint_num_mlps 2 --no_gradient_checkpointing", ["--checkpoint_num_mlps 2", "leave one of them out"]),
        ("--checkpoint_num_layers 5", ["--checkpoint_num_layers 5", "has 4 decoder layers"]),
        ("--checkpoint_num_mlps 1", ["--checkpoint_num_layers 4 and --checkpoint_num_mlps 1", "has 4 decoder layers"]),
        ("--max_new_tokens 100000", ["--max_new_tokens 100000", "2048 positions for prompt and answer"]),
        ("--warmup_ratio 2", ["--warmup_ratio 2.0", "at most 1"]),
        ("--seed -1", ["--seed -1", "at least 0"]),
        ("--seed 4294967296", ["--seed 4294967296", "below 2**32"]),
        ("--recipe missing.yaml", ["--recipe missing.yaml"]),
        ("--output_dir tests", ["--output_dir tests", "--overwrite_output_dir"]),
        ("--output_dir data/tiny_mgm --overwrite_output_dir", ["--output_dir data/tiny_mgm", "the model is there"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the precisions a machine can do are its own")
def test_bad_flags(flags, words, capsys, monkeypatch, tmp_path):
    """Exit code 2 and one line that names the flag; nothing is written."""
    arguments = flags.split()
    if "--output_dir" not in arguments:
        arguments += ["--output_dir", str(tmp_path / "out")]
    line = fail(capsys, monkeypatch, *arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_folders_are_looked_at_by_main_alone(capsys, monkeypatch, tmp_path):
    """A config can be made of any flags; a run into a folder that is in use is refused, and nothing is written."""
    (tmp_path / "notes.txt").touch()
    assert train.TrainConfig(output_dir=str(tmp_path)).output_dir == str(tmp_path)
    assert evaluation.EvalConfig(adapter=str(tmp_path)).model is None
    line = fail(capsys, monkeypatch, "--output_dir", str(tmp_path))
    assert f"--output_dir {tmp_path} is not empty: choose another" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_are_offered_work(name, warmup_ratio, tmp_path):
    """Through runs of one update and of several, to the last one, whatever the warm-up; and `--help` names them."""
    config = train.TrainConfig(lr_scheduler_type=name, warmup_ratio=warmup_ratio, output_dir=str(tmp_path / "out"))
    for num_steps in (1, 2, 7):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        scheduler = train.build_scheduler(config, optimizer, num_steps)
        for _ in range(num_steps):
            optimizer.step()
            scheduler.step()
    assert name in train.TrainConfig.__dataclass_fields__["lr_scheduler_type"].metadata["help"].split(" | ")


def test_every_float_has_to_be_finite():
    """NaN and infinity, of each flag of train.py and memory_probe.py that takes a fraction."""
    for config_class in (train.TrainConfig, ProbeConfig):
        names = [f.name for f in fields(config_class) if f.type in (float, float | None)]
        assert names
        for name in names:
            for value in (math.nan, math.inf):
                with pytest.raises(UserError, match=f"--{name} {value}: .*finite"):
                    config_class(**{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conversations": None}, ["record 0", "id 7", "conversations"]),
        ({"image": None}, ["record 0", "id 7", "1 <image> placeholders but 0 images"]),
        ({"image": "b.png"}, ["record 0", "id 7", "b.png"]),
        ({"image": "../a.png"}, ["record 0", "id 7", "leaves the image folder"]),
    ],
)
def test_bad_records(changes, words, capsys, monkeypatch, tmp_path):
    """A record that cannot be used is named; nothing is written."""
    (tmp_path / "a.png").write_bytes(b"not opened before training")
    line = fail(
        capsys, monkeypatch, "--dataset", dataset_of(tmp_path, **changes), "--output_dir", str(tmp_path / "out")
    )
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_undecodable_image(capsys, monkeypatch, tmp_path):
    """An image that breaks only when a worker opens it: the record is named, and the started run is taken back."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    line = fail(capsys, monkeypatch, "--dataset", dataset_of(tmp_path), "--output_dir", str(tmp_path / "out"))
    assert all(word in line for word in ["record 7", "a.png", "cannot be decoded"]), line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def square_model(tmp_path):
    """The tiny model with a processor that crops pictures to a square."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / MODEL, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"image_aspect_ratio": "square"}))
    return folder


def wide_picture(folder: Path) -> Path:
    """Records of a picture that looks different padded and cropped."""
    folder.mkdir()
    picture = Image.new("RGB", (240, 80), "red")
    picture.save(folder / "wide.png")
    turns = [{"from": "human", "value": "<image>\nWhat is the number?"}, {"from": "gpt", "value": "3"}]
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": "wide.png", "conversations": turns}] * 2))
    return folder / "data.json"


@pytest.mark.parametrize("typed", [None, "pad"])
def test_training_sees_what_the_processor_says(typed, square_model, tmp_path):
    """The base's processor says square: what is typed replaces it, for training and for whatever is saved."""
    config = train.TrainConfig(
        model=str(square_model),
        dataset=str(wide_picture(tmp_path / "data")),
        image_aspect_ratio=typed,
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=1,
        eval_samples=0,
        dataloader_num_workers=0,
    )
    processor = train.build_processor(config)
    expected = typed or "square"
    assert processor.image_aspect_ratio == config.image_aspect_ratio == expected
    dataset, _ = train.build_datasets(config, processor)
    loader, *_ = build_loader(config, dataset, processor, num_processes=1)
    [picture] = dataset[0]["images"]
    views = load_processor(str(square_model)).image_views(picture, expected)
    assert torch.equal(next(iter(loader)).inputs["pixel_values"][0], views[0])


@pytest.mark.slow
def test_the_aspect_ratio_is_saved_with_the_adapter(square_model, tmp_path, monkeypatch):
    """eval.py takes it from there, not from the base."""
    data, output_dir = wide_picture(tmp_path / "data"), tmp_path / "out"
    flags = f"--model {square_model} --dataset {data} --image_aspect_ratio pad --max_steps 1 --eval_samples 0"
    flags += f" --output_dir {output_dir} --per_device_train_batch_size 1 --dataloader_num_workers 0 --no_rehearse"
    ended = forked_runs.run(flags, tmp_path / "logs")
    assert ended.code == 0, ended.err[-3000:]
    assert ended.result["config"]["image_aspect_ratio"] == "pad"
    used = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluation, "answer_all", lambda *args: used.append(args[2]) or ["3", "3"])
    words = ["--adapter", str(output_dir), "--dataset", str(data), "--output", str(tmp_path / "eval.json")]
    evaluation.main(parse_config(evaluation.EvalConfig, words))
    assert used[0].image_aspect_ratio == "pad"


@pytest.mark.slow
def test_replies_that_are_cut_are_counted(tmp_path):
    """Of four samples one ends behind --max_seq_len, and one has no room for any reply: said before step 1."""
    turns = [[{"from": "human", "value": question}, {"from": "gpt", "value": "word " * n}] for question, n in LENGTHS]
    data, output_dir = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps([{"conversations": conversation} for conversation in turns]))
    flags = f"--dataset {data} --output_dir {output_dir} --max_seq_len 64 --max_steps 1 --eval_samples 0"
    ended = forked_runs.run(f"{flags} --dataloader_num_workers 0 --no_rehearse", tmp_path / "logs")
    assert ended.code == 0, ended.err[-3000:]
    assert "Cut 1 of 4 samples at --max_seq_len 64: " in ended.out
    assert ended.out.index("Cut 1 of 4") < ended.out.index("Training ")
    assert ended.result["cut_replies"] == json.loads((output_dir / "run.json").read_text())["cut_replies"] == 1
    assert "Samples cut off at 64 tokens" in (output_dir / "README.md").read_text()


LENGTHS = [("Hi", 2), ("Hi", 500), ("Hi " * 200, 2), ("Hello", 3)]
