"""What the tests share: the original MGM's own numbers, its tiny checkpoint converted, a tiny random model."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from browser import Browser, start_browser
from safetensors.torch import load_file
from torch import nn

from convert_mgm import ConvertConfig
from convert_mgm import main as convert
from data.demo import ensure_demo
from layers.chunked_loss import IGNORE_INDEX
from mgm.configuration_mgm import tiny
from mgm.modeling_mgm import MGMForConditionalGeneration
from mgm.patch_info_mining import MGMPatchInfoMining
from mgm.processing_mgm import MGMProcessor
from models.loading import load_model, load_processor
from step import StepConfig, build_model


# Softmax does not feel what is added to all of a row's products. A bias of the keys adds that, where positions do not
# turn the keys (as they do in the language models), and so does the bias of the norm before them.
KEY_BIASES = re.compile(r"(vision_tower\..*\.k_proj|patch_info_mining\..*key_proj\.[01])\.bias$")


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory):
    """Converted data sets go to a folder of this run, for the tests and for the scripts that they start."""
    folder = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """A tiny checkpoint in the original's layout, its towers, and what the original's code made of some inputs."""
    return Path(__file__).parent / "mgm_reference"


@pytest.fixture
def towers(reference_folder: Path) -> dict[str, str]:
    """The flags that name the tiny towers' folders."""
    folder = reference_folder / "towers/OpenAI"
    return {
        "vision_tower": str(folder / "clip-vit-tiny-patch14-56"),
        "vision_tower_aux": str(folder / "openclip-convnext-tiny-oracle"),
    }


@pytest.fixture(scope="session")
def reference(reference_folder: Path) -> dict[str, torch.Tensor]:
    """The original model's inputs, intermediates and outputs."""
    return load_file(reference_folder / "model.safetensors")


@pytest.fixture(scope="session")
def reference_model_folder(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's tiny checkpoint, converted."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    config = ConvertConfig(
        from_original=str(reference_folder / "tiny_mgm_original"),
        output=str(folder),
        vision_tower=str(reference_folder / "towers/OpenAI/clip-vit-tiny-patch14-56"),
    )
    convert(config)
    return folder


@pytest.fixture
def reference_model(reference_model_folder: Path) -> MGMForConditionalGeneration:
    """A fresh copy of the converted model, in eval mode."""
    return load_model(str(reference_model_folder), torch.float32, "sdpa")


@pytest.fixture(scope="session")
def processor(reference_model_folder: Path) -> MGMProcessor:
    """The converted checkpoint's processor: an image takes 16 positions."""
    return load_processor(str(reference_model_folder))


@pytest.fixture
def tiny_model() -> MGMForConditionalGeneration:
    """The preset `tiny` with random weights, in eval mode."""
    torch.manual_seed(0)
    return MGMForConditionalGeneration(tiny()).eval()


@pytest.fixture(scope="session")
def mixed_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of very different lengths about the demo's images, every third without an image."""
    records = json.loads((ensure_demo() / "validation.json").read_text())[:24]
    for i, record in enumerate(records):
        turn = record["conversations"][0]
        turn["value"] += " Please say it. " * (i % 5)
        if i % 3 == 0:
            del record["image"]
            turn["value"] = turn["value"].removeprefix("<image>\n")
    path = tmp_path_factory.mktemp("data") / "mixed.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def aux_feature_map(model: MGMForConditionalGeneration, pixel_values_aux: torch.Tensor) -> torch.Tensor:
    """[N, C_aux, H, W] as the original makes it: all four stages brought to the first one's size and put together."""
    stages = model.model.convnext_stages(pixel_values_aux)
    size = stages[0].shape[-2:]
    upsampled = [F.interpolate(stage, size=size, mode="bilinear", align_corners=False) for stage in stages[1:]]
    return torch.cat([stages[0], *upsampled], dim=1)


def norm_and_project(projection: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    """What the original does with mining's key and value: LayerNorm and Linear, whatever classes hold the weights."""
    norm, linear = projection
    normed = F.layer_norm(features, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.linear(normed, linear.weight, linear.bias)


def plain_mining(mining: MGMPatchInfoMining, features: torch.Tensor, stages: list[torch.Tensor]) -> torch.Tensor:
    """What mining in the original's form adds to features [N, P, C], one view an image: each position has a key and a
    value. Stages are brought to the first one's size in fp32, as there."""
    size = stages[0].shape[-2:]
    maps = torch.cat([F.interpolate(x.float(), size=size, mode="bilinear").to(x.dtype) for x in stages], dim=1)
    side = size[0] // round(features.shape[1] ** 0.5)
    patches = maps.unfold(2, side, side).unfold(3, side, side)  # [N, C, rows, columns, h, w]
    patches = patches.flatten(4).permute(0, 2, 3, 4, 1).flatten(1, 2)  # [N, P, S, C]
    query = mining.query_proj(features).unsqueeze(2)
    key, value = (norm_and_project(projection, patches) for projection in (mining.key_proj, mining.value_proj))
    weights = (query @ (key / key.shape[-1] ** 0.5).transpose(2, 3)).softmax(-1)
    return (weights.to(value.dtype) @ value).squeeze(2)


def has_no_gradient(name: str) -> bool:
    """Whether a parameter's gradient is zero but for rounding, whatever the batch: two of them are noise beside noise,
    and so is what an optimizer that divides by their size makes of them."""
    return KEY_BIASES.search(name) is not None


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each parameter's within 1e-5 of its norm; those that are nothing but rounding within 1e-5 of all gradients'.

    A gradient that is much smaller than the others is what is left of larger numbers, and has their rounding: its norm
    counts as a hundredth of all gradients' at least."""
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        scale = whole if has_no_gradient(name) else max(gradient.norm(), whole / 100)
        assert (found[name] - gradient).norm() <= 1e-5 * scale, name


@pytest.fixture
def tiny_step() -> Callable[..., dict[str, torch.Tensor]]:
    """A step of train.py's model on text: called with StepConfig's flags it returns the loss and all gradients."""

    def run(watch: Callable[[nn.Module], None] = lambda model: None, **flags) -> dict[str, torch.Tensor]:
        config = StepConfig(**({"model": "tiny", "mixed_precision": "no", "lora_dropout": 0.0} | flags))
        torch.manual_seed(0)
        model = build_model(config, is_deepspeed=False).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then so are most gradients
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        watch(model)
        input_ids = torch.randint(6, 500, (3, 21), generator=torch.Generator().manual_seed(0))
        labels = input_ids.clone()
        labels[:, :5] = IGNORE_INDEX
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {"loss": loss.detach()} | gradients

    return run


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    browser = start_browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A test with it fails if the page's script does."""
    yield chromium
    assert chromium.errors() == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU's memory is measured before this process has a share of it."""
    items.sort(key=lambda item: item.path.name not in ("test_gpu_memory.py", "test_calibrate.py"))
