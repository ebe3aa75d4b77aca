"""Reading arguments and recipes, and how a script ends."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig, resolve_mixed_precision
from models.loading import check_is_no_preset, load_config, load_model, load_processor
from utils import UserError, check_writable, markdown_table, parse_config


ROOT = Path(__file__).parent.parent
SCRIPT = """
import atexit, os, sys
from dataclasses import dataclass
from utils import UserError, run_script

@dataclass(kw_only=True)
class Config:
    end: str = "well"

def main(config):
    print("human output")
    if config.end == "badly":
        raise UserError("--end badly: that is\\nnot an end")
    if config.end == "broken":
        raise RuntimeError("a bug")
    if config.end == "launched":
        os.environ["WORLD_SIZE"] = "2"
        atexit.register(print, "the end")
    return None if config.end == "silently" else {"status": "done", "end": config.end}

if __name__ == "__main__":
    for end in sys.argv[1:]:
        pid = os.fork()
        if pid == 0:
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(f"{end}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
            sys.argv = ["script.py", "--end", end]
            run_script(main, Config, exit_code=lambda result: 3 if result["end"] in ("launched", "problem") else 0)
        print(end, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(kw_only=True)
class Flags(ModelConfig):
    lora_r: int = 16
    learning_rate: float = 1e-3
    packing: bool = False
    gradient_checkpointing: bool = True
    names: list[str] = field(default_factory=lambda: ["q_proj"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_r < 0:
            raise UserError(f"--lora_r {self.lora_r}: it must be at least 0")


def recipe(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--recipe", str(path)]


@pytest.mark.parametrize("argv", [["--lora_r", "8"], ["--lora-r", "8"], ["--lora_r=8"]])
def test_underscores_and_dashes(argv):
    """A flag written with underscores, dashes and an equals sign."""
    assert parse_config(Flags, argv).lora_r == 8


def test_defaults_lists_and_switches():
    """No argument, a list, a switch on and a switch off."""
    assert parse_config(Flags, []) == Flags()
    config = parse_config(Flags, ["--names", "q_proj", "v_proj", "--packing", "--no_gradient_checkpointing"])
    assert config.names == ["q_proj", "v_proj"]
    assert config.packing and not config.gradient_checkpointing


def test_recipe_values_are_overridden_by_flags(tmp_path):
    """A recipe over the defaults, a typed flag over the recipe, wherever --recipe stands."""
    argv = recipe(tmp_path, "lora_r: 8\nlearning_rate: 2e-4\nnames: [k_proj, o_proj]\ngradient_checkpointing: false\n")
    config = parse_config(Flags, argv)
    assert (config.lora_r, config.learning_rate, config.names) == (8, 2e-4, ["k_proj", "o_proj"])
    assert not config.gradient_checkpointing
    for words in (["--lora_r", "4", *argv], [*argv, "--lora-r", "4"]):
        config = parse_config(Flags, words)
        assert (config.lora_r, config.learning_rate) == (4, 2e-4)
    assert parse_config(Flags, [*argv, "--names", "v_proj"]).names == ["v_proj"]


def test_a_config_class_may_have_a_recipe_of_its_own(tmp_path):
    """It lies below --recipe and typed flags, and sees both to decide whether it is wanted."""
    (tmp_path / "own.yaml").write_text("lora_r: 32\nlearning_rate: 4e-3\nnames: [k_proj]\n")

    @dataclass(kw_only=True)
    class WithRecipe(Flags):
        @staticmethod
        def default_recipe(flags):
            return None if flags.packing else tmp_path / "own.yaml"

    def values(*argv):
        config = parse_config(WithRecipe, [*argv])
        return config.lora_r, config.learning_rate, config.names

    assert values() == (32, 4e-3, ["k_proj"])
    typed = recipe(tmp_path, "learning_rate: 2e-4\nnames: [o_proj]\n")
    assert values(*typed) == (32, 2e-4, ["o_proj"])
    assert values(*typed, "--names", "v_proj") == (32, 2e-4, ["v_proj"])
    assert values("--packing") == (16, 1e-3, ["q_proj"])
    assert values(*recipe(tmp_path, "packing: true\n")) == (16, 1e-3, ["q_proj"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 8\n", "unknown key 'lora_rank'"),
        ("lora_r: many\n", "lora_r.*invalid int value: 'many'"),
        ("packing: maybe\n", "packing"),
        ("lora_r: -1\n", "--lora_r -1: it must be at least 0"),
        ("- lora_r\n", "expected lines of 'flag: value'"),
        ("", "expected lines of 'flag: value'"),
        ("lora_r: [\n", "cannot be read as YAML"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    """What a recipe may not hold is a UserError that names it."""
    with pytest.raises(UserError, match=message):
        parse_config(Flags, recipe(tmp_path, text))


def test_a_missing_recipe():
    """The message has the path."""
    with pytest.raises(UserError, match="--recipe nowhere.yaml: there is no such file"):
        parse_config(Flags, ["--recipe", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rank", "8"], "unknown argument --lora_rank"),
        (["--learning", "1"], "unknown argument --learning"),
        (["--lora_r", "many"], "invalid int value: 'many'"),
        (["--lora_r"], "expected one argument"),
        (["--lora_r", "-1"], "--lora_r -1"),
        (["stray"], "unknown argument stray"),
        (["--attn_implementation", "fast"], "--attn_implementation fast: choose one of eager, sdpa"),
        (["--mixed_precision", "fp8"], "--mixed_precision fp8: choose one of auto, no, fp16, bf16"),
        (["--rec", "x.yaml"], "unknown argument --rec"),
    ],
)
def test_bad_arguments(argv, message):
    """Unknown flags, abbreviations, wrong types and values are UserErrors, not argparse's own exit."""
    with pytest.raises(UserError, match=message):
        parse_config(Flags, argv)


@pytest.mark.parametrize(
    ("has_gpu", "has_bf16", "asked", "expected"),
    [
        (False, False, "auto", "no"),
        (True, False, "auto", "fp16"),
        (True, True, "auto", "bf16"),
        (False, False, "bf16", "bf16"),
        (True, False, "fp16", "fp16"),
        (False, False, "fp16", "--mixed_precision fp16: this machine has no GPU"),
        (True, False, "bf16", "--mixed_precision bf16: Old GPU has no bf16 units"),
    ],
)
def test_mixed_precision_is_what_the_machine_can(monkeypatch, has_gpu, has_bf16, asked, expected):
    """auto and the others on a CPU, an older and a newer GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    if expected.startswith("--"):
        with pytest.raises(UserError, match=expected):
            resolve_mixed_precision(asked)
        with pytest.raises(UserError, match=expected):
            parse_config(Flags, ["--mixed_precision", asked])
    else:
        assert resolve_mixed_precision(asked) == expected


def test_a_model_that_is_not_there():
    """Neither preset nor folder nor hub id, a preset where weights are needed, and a folder without a model."""
    with pytest.raises(UserError, match="--model no/such/folder: no such folder, and the presets are tiny, mgm-1"):
        load_model("no/such/folder", torch.float32, "sdpa")
    with pytest.raises(
        UserError, match="--model tiny: there is no such folder here, and the preset of that name has neither weights"
    ):
        check_is_no_preset("tiny")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(ROOT / "tests"), torch.float32, "sdpa")


def test_a_folder_comes_before_a_preset_of_its_name(monkeypatch, tmp_path):
    """The README's conversion writes a folder `mgm-2b`, and trains it: its weights and its processor are loaded."""
    (tmp_path / "mgm-2b").symlink_to(ROOT / "data/tiny_mgm")
    monkeypatch.chdir(tmp_path)
    hidden_size = load_config("tiny").text_config.hidden_size
    assert load_config("mgm-2b").text_config.hidden_size == hidden_size
    weight = load_model("mgm-2b", torch.float32, "sdpa").lm_head.weight
    assert torch.equal(weight, load_model(str(ROOT / "data/tiny_mgm"), torch.float32, "sdpa").lm_head.weight)
    assert load_processor("mgm-2b").tokenizer
    monkeypatch.chdir(ROOT)
    assert load_config("mgm-2b").text_config.hidden_size == 2048


def test_an_adapters_folder_is_no_model(tmp_path):
    """As a run leaves it: the line names the base, and where an adapter is taken."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')
    for load in (load_config, lambda name: load_model(name, torch.float32, "sdpa"), load_processor):
        with pytest.raises(UserError) as refused:
            load(str(tmp_path))
        for words in ("it holds an adapter, not a model. Give its base, --model my/base", f"--adapter {tmp_path}"):
            assert words in str(refused.value)


def test_weights_that_do_not_fit_are_listed(reference_model, tmp_path):
    """A checkpoint with one tensor less: refused by name, not filled up with random numbers."""
    state_dict = reference_model.state_dict()
    del state_dict["lm_head.weight"], state_dict["model.multi_modal_projector.linear_1.bias"]
    reference_model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(UserError, match="missing_keys: model.multi_modal_projector.linear_1.bias"):
        load_model(str(tmp_path), torch.float32, "sdpa")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of a small script for each of its ends, in processes that share their imports."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "well", "silently", "badly", "broken", "problem", "launched"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    codes = dict(line.split() for line in done.stdout.splitlines())
    return {
        end: (int(code), (folder / f"{end}.stdout").read_text(), (folder / f"{end}.stderr").read_text())
        for end, code in codes.items()
    }


def test_a_script_that_ends_well(runs):
    """Exit code 0; the last line on stdout is main's result as JSON."""
    code, stdout, _ = runs["well"]
    assert code == 0
    assert json.loads(stdout.splitlines()[-1]) == {"status": "done", "end": "well"}


def test_the_exit_code_is_the_results(runs):
    """Also of a process that a launcher has started; it runs its exit functions too."""
    assert runs["problem"][0] == runs["launched"][0] == 3
    assert [json.loads(line)["end"] for line in runs["problem"][1].splitlines()[1:]] == ["problem"]
    assert runs["launched"][1].splitlines()[-1] == "the end"


def test_a_process_without_a_result_prints_none(runs):
    """None from main, as on all processes but the first: no JSON line."""
    assert runs["silently"][:2] == (0, "human output\n")


def test_bad_input_is_one_line_and_exit_code_2(runs):
    """A UserError: one line on stderr even where the message had several, no traceback."""
    code, stdout, stderr = runs["badly"]
    assert code == 2
    assert stderr.splitlines()[-1] == "error: --end badly: that is not an end"
    assert "Traceback" not in stderr
    assert stdout == "human output\n"


def test_a_bug_keeps_its_traceback_and_exit_code_1(runs):
    """Any other exception is not dressed up as bad input."""
    code, _, stderr = runs["broken"]
    assert code == 1
    assert "Traceback" in stderr and "RuntimeError: a bug" in stderr


def test_cells_of_a_table_stay_in_their_row():
    """Numbers are written out; a bar is escaped and a line break becomes a space."""
    table = markdown_table(["flag", "value"], {"lora_r": 16, "prompt": "a | b\nc"}.items())
    assert table == "| flag | value |\n|---|---|\n| lora_r | 16 |\n| prompt | a \\| b c |"


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_a_file_is_no_folder(folder, tmp_path):
    """One line, whether the path is a file or would lie below one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--output .*{folder}: cannot be written .* choose another"):
        check_writable("output", tmp_path / folder)
    check_writable("output", tmp_path / "new/folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_tiny_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (Path(ModelConfig().model) / "config.json").is_file()


def allocator_after(
    variables: dict[str, str], code: str = "print(torch._C._accelerator_getAllocatorSettings())"
) -> str:
    """What a new process prints that imports torch with these variables and sets the allocator."""
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | variables
    command = [sys.executable, "-c", f"import torch, utils; utils.set_allocator(); {code}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.5"}, "garbage_collection_threshold:0.5"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.5"}, "garbage_collection_threshold:0.5"),
    ],
)
def test_the_allocator_is_set(variables: dict[str, str], expected: str) -> None:
    """The user's own settings stay. Predictions are for the same, and the processes that start later have them."""
    assert allocator_after(variables, "print(utils.allocator_settings())") == expected
    if "PYTORCH_CUDA_ALLOC_CONF" not in variables:  # PyTorch for CPUs does not read this name
        assert allocator_after(variables) == expected
        assert allocator_after(variables, "import os; print(os.environ['PYTORCH_ALLOC_CONF'])") == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_segments_grow_on_a_gpu() -> None:
    """Of 21 MiB it reserves two pages of 20 MiB. Segments that cannot grow would take 22 MiB."""
    reserved = "x = torch.empty(21 * 2**20, dtype=torch.uint8, device='cuda'); print(torch.cuda.memory_reserved())"
    assert allocator_after({}, reserved) == str(40 * 2**20)
    assert allocator_after({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, reserved) == str(22 * 2**20)
