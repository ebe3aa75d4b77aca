"""What all scripts share: errors, reading flags, how a script ends, units."""

import atexit
import errno
import json
import math
import os
import platform
import signal
import sys
import tempfile
import warnings
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import field, fields
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser


Config = TypeVar("Config")
# PyTorch reads them when it is imported, the old name first.
ALLOCATOR_VARIABLE, OLD_ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
# Segments that can grow suit the weights that ZeRO-3 gathers, of all sizes: MGM-2B reserves 1.9 GiB instead of 2.6.
ALLOCATOR_SETTINGS = "expandable_segments:True"
MIB, GIB = 2**20, 2**30
NUM_NAMED = 8  # samples or modules that a message names
RESUME = "resume"  # in a flag's metadata
METAVARS = {int: "N", float: "X", str: "NAME"}  # what stands for a flag's value in the help


class UserError(Exception):
    """Bad input. The message is the one line a user reads: it names the thing and the remedy."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        # An exception in a loader's worker arrives as a new one, whose message is the whole traceback.
        super().__init__(message.rpartition("UserError: ")[2].strip())


class BadSample(UserError):
    """A sample that cannot be loaded, found while training. All processes raise it together."""


class LostWorker(UserError):
    """A process of the data loader has died while training. All processes raise it together."""

    exit_code = 1


class Interrupted(BaseException):
    """SIGTERM or SIGINT, raised where the run can end cleanly. Exit code 143 or 130."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def brief_error(error: Exception) -> str:
    """The operating system's text, or the message's first line."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def suggestion(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" with the known words that are like it, or nothing."""
    similar = get_close_matches(word, list(known))
    return f", did you mean {' or '.join(similar)}?" if similar else ""


def markdown_table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(map(escape_cell, cells)) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def escape_cell(value: object) -> str:
    """The value's text in one line, its bars escaped: a bar or a line break would end the cell."""
    return " ".join(str(value).replace("|", "\\|").split())


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    write_whole(path, (json.dumps(value, indent=indent) + "\n").encode())


def write_whole(path: str | Path, content: bytes) -> None:
    """Write beside the file and rename: an interruption leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def environment(*packages: str) -> dict[str, str]:
    """What figures were measured on: Python, the GPU or else the processor, and each installed package's version."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    found = {"python": platform.python_version(), "device": device}
    for package in packages:
        with suppress(PackageNotFoundError):  # one process needs no DeepSpeed
            found[package] = version(package)
    return found


def name_some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + rest


def size(nbytes: float) -> str:
    """For people: GiB, or MiB where GiB would read 0.00."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:.2f} MiB"


def counted(number: int, noun: str) -> str:
    """The number and its noun: 1 row, 2 rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command line. None, a default that depends on other things, is left out."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"--{name} {value}: choose one of {', '.join(choices)}")


def check_device(device: str) -> None:
    """Raise UserError unless it is cuda or cpu, and this machine has it."""
    check_choice("device", device, ("cuda", "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU, choose cpu")


def check_writable(name: str, folder: Path) -> None:
    """Raise UserError unless a file can be made in the folder, or in its nearest parent. Leaves nothing behind."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--{name} {folder}: cannot be written ({brief_error(error)}), choose another") from None


def check_minimum(config: object, **minimums: float) -> None:
    """Raise UserError where a numeric flag of `config` lies below its minimum, or is NaN or infinite."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is None:  # a default that depends on other things
            continue
        if not math.isfinite(value):
            raise UserError(f"--{name} {value}: it must be a finite number")
        if value < minimum:
            raise UserError(f"--{name} {value}: it must be at least {minimum}")


def flag(default: Any, help: str) -> Any:
    """A field of a dataclass of flags."""
    return field(default=default, metadata={"help": help})


def free_on_resume(default: Any, help: str) -> Any:
    """A flag that may have another value when a run is resumed. All flags not made by this must stay."""
    return field(default=default, metadata={"help": help, RESUME: "free"})


def flags_free_on_resume(config_class: type) -> set[str]:
    return {flag.name for flag in fields(config_class) if flag.metadata.get(RESUME) == "free"}


class FlagParser(HfArgumentParser):
    """HfArgumentParser with a shorter help: each flag by one name, and a default only where there is one."""

    def add_argument(self, *names: str, **options: Any) -> Action:
        options.pop(RESUME, None)  # HfArgumentParser passes a flag's whole metadata on
        name, *others = names
        if name == "-h":
            return super().add_argument(*names, **options)
        for other in others:  # --lora-r for --lora_r
            super().add_argument(other, **options | {"help": SUPPRESS, "required": False})
        default = options.get("default")
        if options.get("action") == "store_false":
            options["help"] = f"the same as {name.replace('no_', '', 1)} false"
        elif default is not None and default is not False:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] = f"{options.get('help', '')} (default: {shown})"
        if "type" in options:
            options["metavar"] = METAVARS.get(options["type"], "BOOL")
        return super().add_argument(name, **options)


def parse_config(config_class: type[Config], argv: list[str]) -> Config:
    """Flags (`--lora_r` and `--lora-r` alike) over those of `--recipe FILE.yaml` over the dataclass's defaults.

    A config class may have a `default_recipe(flags)`: it sees the parsed flags and returns the recipe whose
    flags all others override, or None.
    """
    parser = flag_parser(config_class)
    parser.add_argument("--recipe", metavar="FILE.yaml", help="flags with their values; those typed override them")

    recipe_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--recipe")
    recipe_parser.error = _raise_user_error
    recipe = recipe_parser.parse_known_args(argv)[0].recipe
    names = {f.name for f in fields(config_class)}
    words = [*(read_recipe(recipe, names) if recipe else []), *argv]
    # Before the dataclass complains of what a mistyped flag has not set.
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        known = [f"--{name}" for name in names]
        raise UserError(f"unknown argument {unknown[0]}: see --help{suggestion(unknown[0], known)}")
    check_lists_once(config_class, argv)
    default_recipe = getattr(config_class, "default_recipe", None)
    if default_recipe is not None and (path := default_recipe(flags)) is not None:
        words = [*read_recipe(path, names), *words]
    config, *_ = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    return config


def check_lists_once(config_class: type, argv: list[str]) -> None:
    """Raise UserError for a flag of several values that stands twice: the second would replace the first."""
    given = [word.partition("=")[0].replace("-", "_").strip("_") for word in argv if word.startswith("--")]
    for each in fields(config_class):
        if "list" in str(each.type) and given.count(each.name) > 1:
            raise UserError(f"--{each.name}: given twice, write all its values behind one")


def flag_parser(config_class: type) -> HfArgumentParser:
    """A parser of the class's flags. It raises UserError where argparse would end the process."""
    description = sys.modules["__main__"].__doc__
    layout = {"usage": SUPPRESS, "description": description, "formatter_class": RawDescriptionHelpFormatter}
    parser = FlagParser(config_class, allow_abbrev=False, **layout)
    parser.error = _raise_user_error
    return parser


def read_recipe(path: str | Path, names: set[str]) -> list[str]:
    """A YAML file of flags as command-line arguments, so that one parser checks them all."""
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"--recipe {path}: there is no such file") from None
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--recipe {path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"--recipe {path}: expected lines of 'flag: value'")
    for name in recipe:
        if name not in names:
            raise UserError(f"--recipe {path}: unknown key {name!r}: see --help for the flags")
    return flag_words(recipe)


def _raise_user_error(message: str) -> NoReturn:
    raise UserError(message)


def run_script(
    main: Callable[[Config], dict | None], config_class: type[Config], exit_code: Callable[[dict], int] = lambda _: 0
) -> NoReturn:
    """Run a script and end its process. main's result is the last line on stdout (None: another process prints it).

    The exit code is that of the result. Bad input is one line on stderr and exit code 2, a lost worker one and 1,
    SIGTERM and SIGINT one and 143 and 130; any other exception keeps its traceback and exit code 1.
    """
    quiet_libraries()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _interrupt)
    set_allocator()
    try:
        result = main(parse_config(config_class, sys.argv[1:]))
    except UserError as error:
        sentences = [str(error), *getattr(error, "__notes__", [])]
        print(f"error: {' '.join('. '.join(sentences).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        remedy = "make room; train.py goes on with --resume_from_checkpoint latest"
        print(f"error: {brief_error(error)}: {remedy}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}", file=sys.stderr)
        sys.exit(128 + interrupted.signum)
    code = 0
    if result is not None:
        print(json.dumps(result), flush=True)
        code = exit_code(result)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end_at_once(code)
    sys.exit(code)


def _end_at_once(code: int) -> NoReturn:
    """End this process, whose work is done, without ending the interpreter in it. There a thread of gloo's that is the
    last to hold a tensor would abort it, and the launcher would say that the run has failed."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def allocator_settings() -> str:
    """PyTorch's allocator settings in a run and in a prediction: the user's own, or else ours."""
    own = os.environ.get(ALLOCATOR_VARIABLE, ALLOCATOR_SETTINGS)
    return os.environ.get(OLD_ALLOCATOR_VARIABLE, own)


def set_allocator() -> None:
    """Give the allocator its settings, in this process and in those that it starts. Before the first use of CUDA."""
    if not {ALLOCATOR_VARIABLE, OLD_ALLOCATOR_VARIABLE} & os.environ.keys():
        os.environ[ALLOCATOR_VARIABLE] = ALLOCATOR_SETTINGS
        torch._C._accelerator_setAllocatorSettings(ALLOCATOR_SETTINGS)  # the import has read the variable already


def is_disk_full(error: OSError | SafetensorError) -> bool:
    """No room, no quota left, or a disk that has become read-only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signum)


def quiet_libraries() -> None:
    """Silence the libraries' warnings for developers, so that a user sees our own messages."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers)")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to detect it
