"""Patch info mining against the original's form of it, in value and in gradient, whatever the chunks."""

import pytest
import torch
from conftest import plain_mining
from torch.utils.checkpoint import checkpoint

from mgm import patch_info_mining
from mgm.configuration_mgm import tiny
from mgm.patch_info_mining import MGMPatchInfoMining, chunks, upsampled_rows


NUM_IMAGES = 3


def make_inputs(image_grid: int = 1, image_global: bool = False) -> tuple[MGMPatchInfoMining, torch.Tensor, list]:
    """A mining module, CLIP features of 3 images' views, and the aux tower's stages of 32, 16, 8 and 4 positions."""
    torch.manual_seed(0)
    config = tiny()
    mining = MGMPatchInfoMining(config).train()
    for parameter in mining.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    num_views = image_grid**2 + image_global
    features = torch.randn(NUM_IMAGES * num_views, config.patch_grid_size**2, config.vision_config.hidden_size)
    sides = [32, 16, 8, 4]
    channels = config.vision_config_aux.hidden_sizes
    return mining, features, [torch.randn(NUM_IMAGES, c, s, s) for c, s in zip(channels, sides, strict=True)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(
    "chunk_elements", [1, 16 * 32 * 208, 10**9]
)  # rows of patches, part of the images, everything
def test_values_and_gradients_are_the_originals(monkeypatch, chunk_elements, is_checkpointed):
    monkeypatch.setattr(patch_info_mining, "CHUNK_ELEMENTS", chunk_elements)
    mining, features, stages = make_inputs()
    if is_checkpointed:
        mining.gradient_checkpointing = True
        mining._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
    toward = torch.randn(features.shape)
    outputs, gradients = [], []
    for output in (mining(features, stages), features + plain_mining(mining, features, stages)):
        outputs.append(output)
        gradients.append(torch.autograd.grad((output * toward).sum(), list(mining.parameters())))
    assert relative_error(outputs[0] - features, outputs[1] - features) < 1e-5
    for (name, _), found, expected in zip(mining.named_parameters(), *gradients, strict=True):
        if name in ("key_proj.0.bias", "key_proj.1.bias"):  # moves all products of a patch alike: no gradient
            assert found.norm() < 1e-5 * gradients[1][0].norm()
        else:
            assert relative_error(found, expected) < 1e-5, name


def test_chunks_cover_everything_once(monkeypatch):
    """Images or rows of patches, in order and without a gap; a chunk is no larger than it may be."""
    monkeypatch.setattr(patch_info_mining, "CHUNK_ELEMENTS", 1000)
    for elements_of_view in (10, 300, 1000, 1001, 6000, 24_000, 10**6):
        images, rows = chunks(num_images=7, patch_grid_size=24, elements_of_view=elements_of_view)
        for slices, length in ((images, 7), (rows, 24)):
            assert [i for part in slices for i in range(length)[part]] == list(range(length))
        num_images, num_rows = images[0].stop, rows[0].stop
        assert num_images * num_rows * elements_of_view / 24 <= 1000 or (num_images, num_rows) == (1, 1)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_rows_are_those_of_the_whole_map(scale):
    """A band of rows, brought to the full size by itself, is that band of the whole, but for rounding."""
    features = torch.randn(2, 3, 32 // scale, 32 // scale)
    whole = torch.nn.functional.interpolate(features, size=(32, 32), mode="bilinear") if scale > 1 else features
    for top in range(0, 32, 4):
        for bottom in range(top + 4, 33, 4):
            torch.testing.assert_close(upsampled_rows(features, 32, top, bottom), whole[:, :, top:bottom])


def test_nothing_of_an_images_positions_is_kept_for_the_backward_pass():
    """Checkpointed, the graph holds the tower's stages and per patch features, but none as large as the positions."""
    mining, features, stages = make_inputs()
    mining.gradient_checkpointing = True
    mining._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mining(features, stages)
    positions = NUM_IMAGES * 32 * 32 * sum(tiny().vision_config_aux.hidden_sizes)
    assert max(saved) < positions / 4
