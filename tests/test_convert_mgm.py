"""The conversion: names and sizes of the released model, tensors unchanged, and what it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_mgm import ConvertConfig, main
from mgm_names import rename_open_clip, rename_original
from utils import UserError
from weight_files import write_safetensors


AUX = "model.vision_tower_aux."
DROPPED = ("model.norm.weight", "model.mm_projector.0.bias")


@pytest.fixture
def towers(reference_folder: Path) -> dict[str, str]:
    """The flags that name the tiny towers' folders."""
    folder = reference_folder / "towers/OpenAI"
    return {
        "vision_tower": str(folder / "clip-vit-tiny-patch14-56"),
        "vision_tower_aux": str(folder / "openclip-convnext-tiny-oracle"),
    }


@pytest.fixture
def original(reference_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in the original's layout, alone in its folder: to be damaged."""
    return Path(shutil.copytree(reference_folder / "tiny_mgm_original", tmp_path / "original/checkpoint"))


@pytest.fixture
def config(original: Path, towers: dict[str, str], tmp_path: Path) -> ConvertConfig:
    return ConvertConfig(from_original=str(original), output=str(tmp_path / "out/model"), **towers)


def edit_tensors(folder: Path, edit) -> None:
    """Replace the tensors of every weight file by `edit(tensors)`."""
    for path in sorted(folder.glob("*.safetensors")):
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_tensors_are_renamed_never_changed(reference_folder, reference_model_folder):
    """Every tensor of the converted checkpoint with the original's, bit for bit, dtype included."""
    original = all_tensors(reference_folder / "tiny_mgm_original")
    converted = all_tensors(reference_model_folder)
    expected = {rename_original(name): tensor for name, tensor in original.items()}
    expected.pop(None, None)
    assert converted.keys() == expected.keys()
    for name, tensor in converted.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    index = json.loads((reference_model_folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == converted.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in converted.values())


def test_config_is_the_originals(reference_folder, reference_model):
    """Sizes, epsilons and special tokens with the original's config.json."""
    original = json.loads((reference_folder / "tiny_mgm_original/config.json").read_text())
    config = reference_model.config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size", "rms_norm_eps"):
        assert getattr(config.text_config, name) == original[name], name
    assert config.text_config.hidden_act == original["hidden_activation"]
    assert config.vision_config.hidden_size == original["mm_hidden_size"]
    assert sum(config.vision_config_aux.hidden_sizes) == original["mm_hidden_size_aux"]
    assert config.vision_config_aux.image_size == original["image_size_aux"]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 0)
    assert reference_model.generation_config.eos_token_id == [1, 5]  # <eos>, <end_of_turn>


def test_aux_weights_come_from_their_own_folder_where_the_checkpoint_lacks_them(config, original, towers):
    """A checkpoint without ConvNeXt tensors, as released ones are: those of the tower's OpenCLIP file are taken."""
    edit_tensors(original, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(AUX)})
    path = Path(towers["vision_tower_aux"]) / "open_clip_pytorch_model.bin"
    tower = {rename_open_clip(name): tensor for name, tensor in torch.load(path, weights_only=True).items()}
    tower.pop(None, None)
    main(config)
    assert [path.name for path in Path(config.output).parent.iterdir()] == ["model"]  # no temporary folder beside it
    converted = all_tensors(Path(config.output))
    assert tower.keys() == {name for name in converted if name.startswith(AUX)}
    for name, tensor in tower.items():
        assert torch.equal(converted[name], tensor), name


def test_the_checkpoints_own_aux_weights_win(config, original):
    """A checkpoint with ConvNeXt tensors of its own keeps them, whatever lies in the tower's folder."""
    edit_tensors(original, lambda tensors: {k: v + 1 if k.startswith(AUX) else v for k, v in tensors.items()})
    main(config)
    expected = {rename_original(k): v for k, v in all_tensors(original).items() if k.startswith(AUX)}
    converted = all_tensors(Path(config.output))
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("flag", ["vision_tower", "vision_tower_aux"])
def test_a_missing_tower_is_a_user_error(config, original, flag):
    """Neither given nor beside the checkpoint, and given but not there: the message has the flag."""
    edit_tensors(original, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(AUX)})
    with pytest.raises(UserError, match=f"give --{flag} DIR"):
        main(replace(config, **{flag: None}))
    with pytest.raises(UserError, match=f"--{flag} nowhere: no such folder"):
        main(replace(config, **{flag: "nowhere"}))
    assert not Path(config.output).parent.exists()


def test_a_tower_folder_without_weights(config, original, tmp_path):
    """The error names the folder."""
    edit_tensors(original, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(AUX)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: there is no \*.safetensors or \*.bin in it"):
        main(replace(config, vision_tower_aux=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("edit", "problems"),
    [
        (
            lambda tensors: {
                k: v for k, v in tensors.items() if k not in ("model.norm.weight", "model.mm_projector.0.bias")
            },
            ["missing model.language_model.norm.weight", "missing model.multi_modal_projector.linear_1.bias"],
        ),
        (
            lambda tensors: (
                {**tensors, "model.layers.7.mlp.up_proj.weight": torch.zeros(2)}
                if "model.norm.weight" in tensors
                else tensors
            ),
            ["unexpected model.language_model.layers.7.mlp.up_proj.weight"],
        ),
        (
            lambda tensors: {k: v[:3] if k == "model.norm.weight" else v for k, v in tensors.items()},
            [r"model.language_model.norm.weight has shape \(3,\), expected \(64,\)"],
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_tensors_that_do_not_fit_are_listed(config, original, edit, problems):
    """Every missing, unexpected or misshapen tensor is named, and nothing is written."""
    edit_tensors(original, edit)
    with pytest.raises(UserError, match=f"{len(problems)} tensors do not fit the config") as error:
        main(config)
    for problem in problems:
        assert re.search(problem, str(error.value)), problem
    assert not Path(config.output).parent.exists()


def test_existing_output_is_refused(config, original, towers):
    """An existing folder, even an empty one, is left as it is."""
    output = Path(config.output)
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists: choose a new folder"):
        ConvertConfig(from_original=str(original), output=str(output), **towers)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_a_failure_while_writing_leaves_no_output(config, monkeypatch):
    """A disk that fills up in the second file: no folder under the output's name."""
    calls = []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        write_safetensors(*args)

    monkeypatch.setattr("checkpoint.write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main(config)
    assert not Path(config.output).exists()
    assert list(Path(config.output).parent.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"), [({}, "give --from_original"), ({"from_original": "x"}, "--output DIR")]
)
def test_both_folders_are_needed(given, message):
    """Without the input's or the output's folder the message names the flags."""
    with pytest.raises(UserError, match=message):
        ConvertConfig(**given)


def test_a_folder_without_a_checkpoint(tmp_path):
    """--from_original has to hold a config.json."""
    with pytest.raises(UserError, match="there is no config.json in it"):
        ConvertConfig(from_original=str(tmp_path), output=str(tmp_path / "out"))
