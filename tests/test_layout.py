"""The house: few files at the top, and imports that go down only."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
# From the top floor down. What stands on one floor does not import each other; a folder may import itself.
FLOORS = (
    ("train",),
    ("training",),
    ("eval", "memory_probe", "convert_mgm"),
    ("planning",),
    ("evaluation", "memory", "conversion"),
    ("data",),
    ("step",),
    ("models",),
    ("mgm",),
    ("chat",),
    ("layers",),
    ("utils", "child_processes", "quiet"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Neither step.py nor what predicts it knows a model by name.
KNOWS_NO_MODEL = ("train", "training", "planning", "memory", "memory_probe", "step")
SOURCES = [path for name in FLOOR for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")] if path.is_file()]


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The project's files and folders that a file imports anywhere in it, also inside of functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules} & FLOOR.keys()


def test_at_most_eight_files_at_the_top():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files <= FLOOR.keys() and len(files) <= 8


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    """Every import is from the file's own folder or from a lower floor."""
    here = place_of(path)
    climbing = {name for name in imported(path) - {here} if FLOOR[name] <= FLOOR[here]}
    assert not climbing, f"{path.relative_to(ROOT)} imports {', '.join(climbing)}, which is not below it"


def test_mgm_is_loaded_by_name_alone():
    """What trains, predicts and measures imports no model's folder."""
    knowing = {
        str(path.relative_to(ROOT)) for path in SOURCES if place_of(path) in KNOWS_NO_MODEL and "mgm" in imported(path)
    }
    assert not knowing
