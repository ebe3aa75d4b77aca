"""The conversion: names and sizes of the released model, tensors unchanged, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import all_tensors, assert_same, edit_tensors

from conversion.names import rename_open_clip, rename_original
from convert_mgm import ConvertConfig, main
from models.loading import load_config, load_model, load_processor
from utils import UserError, parse_config


AUX, CLIP = "model.vision_tower_aux.", "model.vision_tower."
DROPPED = ("model.norm.weight", "model.mm_projector.0.bias")


@pytest.fixture
def original(reference_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in the original's layout, alone in its folder: to be damaged."""
    return Path(shutil.copytree(reference_folder / "tiny_mgm_original", tmp_path / "original/checkpoint"))


@pytest.fixture
def config(original: Path, towers: dict[str, str], tmp_path: Path) -> ConvertConfig:
    return ConvertConfig(from_original=str(original), output=str(tmp_path / "out/model"), **towers)


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

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr("conversion.shards.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main(config)
    assert not Path(config.output).exists()
    assert list(Path(config.output).parent.iterdir()) == []


def write_layout(folder: Path, layout: str) -> None:
    """Store the checkpoint's tensors otherwise, in one file or as .bin, with what trainers leave beside it."""
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    for path in folder.glob("model*"):
        path.unlink()
    if "single" in layout:
        files = {"model.safetensors": {name: tensor for tensors in files.values() for name, tensor in tensors.items()}}
    for name, tensors in files.items():
        if "bin" in layout:
            path = folder / name.replace("model", "pytorch_model").replace("safetensors", "bin")
            torch.save(tensors, path, _use_new_zipfile_serialization="old" not in layout)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    torch.save({"learning_rate": object}, folder / "training_args.bin")  # an object, which must not be loaded


@pytest.mark.parametrize("layout", ["shards", "single", "bin shards", "bin single", "old bin single"])
@pytest.mark.parametrize("lacking", [(), (AUX,), (AUX, CLIP)], ids=["towers inside", "no ConvNeXt", "no towers"])
def test_every_layout(config, original, reference_model_folder, layout, lacking):
    """One model in five layouts, towers inside or beside: the converted tensors with those of the usual layout, the
    loaded model's parameters with the same, and what is handed back with what the checkpoint held."""
    edit_tensors(original, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(lacking or "-")})
    for path in original.glob("*.safetensors"):
        if not load_file(path):
            path.unlink()
    held = all_tensors(original)
    write_layout(original, layout)
    main(config)
    output = Path(config.output)
    expected = all_tensors(reference_model_folder)
    assert_same(all_tensors(output), expected)
    names = {path.name for path in output.glob("*.safetensors")}
    assert ("vision_tower_aux.safetensors" in names, "vision_tower.safetensors" in names) == (
        AUX in lacking,
        CLIP in lacking,
    )
    loaded = dict(load_model(str(output), torch.float32, "sdpa").named_parameters())
    assert_same({name: parameter.data for name, parameter in loaded.items()}, expected)

    back = output.with_name("back")
    main(ConvertConfig(to_original=str(output), output=str(back)))
    assert_same(all_tensors(back), held)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == held.keys()
    assert {path.name for path in back.glob("*.safetensors")} == set(index["weight_map"].values())


@pytest.mark.parametrize("layout", ["shards", "single"])
@pytest.mark.parametrize("lacking", [(), (AUX,)], ids=["towers inside", "no ConvNeXt"])
def test_a_round_trip_is_to_the_byte(config, original, layout, lacking):
    """Every file there and back with itself: weights, index, tokenizer, generation; config.json key by key."""
    lacking = lacking or ("no tensor's beginning",)
    edit_tensors(original, lambda group: {k: v.bfloat16() for k, v in group.items() if not k.startswith(lacking)})
    if layout == "single":
        write_layout(original, layout)
        (original / "training_args.bin").unlink()
    else:
        tensors = {path.name: load_file(path) for path in original.glob("*.safetensors")}
        index = {
            "metadata": {"total_size": sum(x.nbytes for group in tensors.values() for x in group.values())},
            "weight_map": {name: file_name for file_name, group in tensors.items() for name in group},
        }
        (original / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    main(config)
    back = Path(config.output).with_name("back")
    main(ConvertConfig(to_original=config.output, output=str(back)))
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    files_back = {path.name: path.read_bytes() for path in back.iterdir()}
    assert json.loads(files_back.pop("config.json")) == json.loads(files.pop("config.json"))
    if layout == "single":
        del files_back["model.safetensors.index.json"]  # the original needs one, even so
    assert files_back == files


def test_a_head_of_its_own(config, original):
    """A tied checkpoint that repeats the embeddings loses its lm_head, another head is an error, untied it is kept."""
    is_last = "model.mm_projector.0.bias"
    head = all_tensors(original)["model.embed_tokens.weight"]
    edit_tensors(original, lambda tensors: {**tensors, "lm_head.weight": head} if is_last in tensors else tensors)
    main(config)
    assert "lm_head.weight" not in all_tensors(Path(config.output))

    other = head + 1
    edit_tensors(original, lambda tensors: {**tensors, "lm_head.weight": other} if is_last in tensors else tensors)
    config = replace(config, output=config.output + "-2")
    with pytest.raises(UserError, match=r"model-00003.*lm_head\.weight differs from the embeddings"):
        main(config)
    edit_config(original, tie_word_embeddings=False)
    main(config)
    assert torch.equal(all_tensors(Path(config.output))["lm_head.weight"], other)
    assert torch.equal(load_model(config.output, torch.float32, "sdpa").lm_head.weight, other)


def edit_config(folder: Path, **changes) -> None:
    """Change keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_hd(config, original, towers, tmp_path):
    """An HD checkpoint's crops reach the model's config and the processor."""
    edit_config(original, image_grid=2, image_global=True, image_size_aux=256)
    main(config)
    model, processor = load_config(config.output), load_processor(config.output)
    assert (model.image_grid, model.image_global, model.vision_config_aux.image_size) == (2, True, 256)
    assert processor.num_image_tokens == model.num_image_tokens == 5 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower_aux": None}, "no mm_vision_tower_aux, so it is no MGM's"),
        ({"model_type": "mgm_mixtral"}, "model_type 'mgm_mixtral': expected mgm, mgm_gemma"),
        ({"text_config": {}}, "in transformers' layout already"),
        ({"image_size_aux": 100}, "image_size as a multiple of 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_configs_are_refused(config, original, changes, message):
    """Another model's config.json, and one whose sizes do not fit together."""
    edit_config(original, **changes)
    with pytest.raises(UserError, match=message):
        main(config)
    assert not Path(config.output).parent.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"from_original": "x"}, "give --output DIR"),
        ({"from_original": "x", "to_original": "x", "output": "y"}, "exactly one"),
        ({"from_original": "x", "assemble": True, "output": "y"}, "exactly one"),
        ({"assemble": True, "output": "y", "vision_tower": "x"}, "give --llm DIR, --vision_tower_aux DIR"),
        ({"from_original": "x", "output": "y", "adapter": "a"}, "--adapter a: --from_original has no use for it"),
        ({"from_original": "x", "output": "y", "llm": "a"}, "--llm a: --from_original has no use for it"),
        ({"to_original": "x", "output": "y", "vision_tower": "a"}, "--vision_tower a: --to_original has no use"),
        (
            {
                "assemble": True,
                "output": "y",
                "llm": "a",
                "vision_tower": "b",
                "vision_tower_aux": "c",
                "adapter": "d",
            },
            "--adapter d: --assemble has no use for it",
        ),
    ],
)
def test_flags_that_do_not_go_together(given, message):
    """Too few, too many, and flags of another direction: the message names them."""
    with pytest.raises(UserError, match=message):
        ConvertConfig(**given)


@pytest.mark.slow
def test_the_command_line(original, tmp_path):
    """The script itself: wrong flags are one line and exit code 2, the last line of a conversion is JSON."""
    command = [sys.executable, "convert_mgm.py", "--output", str(tmp_path / "out")]
    wrong = subprocess.run([*command, "--assemble", "--to_original", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: give --from_original DIR") and wrong.stderr.count("\n") == 1
    right = subprocess.run([*command, "--to_original", "data/tiny_mgm"], capture_output=True, text=True)
    assert right.returncode == 0, right.stderr
    assert json.loads(right.stdout.splitlines()[-1])["status"] == "done"


@pytest.mark.parametrize("flag", ["from_original", "to_original"])
def test_a_folder_without_a_checkpoint(tmp_path, flag):
    """The input has to hold a config.json."""
    with pytest.raises(UserError, match=f"--{flag} .*: there is no config.json in it"):
        ConvertConfig(**{flag: str(tmp_path), "output": str(tmp_path / "out")})


def test_a_mistyped_flag_is_named():
    """Not what is missing without it."""
    with pytest.raises(UserError, match="unknown argument --to_orignal"):
        parse_config(ConvertConfig, ["--to_orignal", "x", "--output", "y"])
