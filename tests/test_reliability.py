"""docs/reliability.md: every test that it names is there, and every test of these faults is named."""

import re
from pathlib import Path


TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/reliability.md").read_text()
FILES = (
    "test_resume.py",
    "test_previous_run.py",
    "test_loader.py",
    "test_faults.py",
    "test_rehearsal.py",
    "test_safety.py",
)


def test_the_tests_exist() -> None:
    """A row without a test says why."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (TESTS / file).read_text(), f"{file}::{name}"
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| what", "|---"))]
    assert [row for row in rows if "::" not in row and "Not tested" not in row] == []


def test_no_fault_is_left_out() -> None:
    """The slow tests of these files are all on the page."""
    for file in FILES:
        slow = re.findall(r"mark\.slow\n(?:@.*\n)*def (test_\w+)", (TESTS / file).read_text())
        for name in slow:
            assert f"`{file}::{name}`" in PAGE, name
