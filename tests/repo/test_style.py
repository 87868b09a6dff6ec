"""Format, lint and types are part of the suite: one command checks all."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGER = {
    "relora_core/low_rank/parametrization.py": "one class, half of it docstrings",
    "relora_core/testing/machine.py": "one class, as hypothesis wants all rules of a machine",
    "reference_trainer/config.py": "every option in one place",
}


@pytest.mark.parametrize(
    "command",
    [["ruff", "format", "--check"], ["ruff", "check"], ["mypy"]],
    ids=["format", "lint", "types"],
)
def test_the_tree_passes(command):
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_module_has_at_most_300_lines_or_a_reason():
    rooms = ("relora_core", "reference_trainer")
    files = [file for room in rooms for file in (ROOT / room).rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert {file for file, length in lengths.items() if length > 300} == LONGER.keys()


def test_a_module_docstring_is_a_noun_phrase():
    """It says what the file holds, and needs no subordinate clause for that."""
    rooms = ("relora_core", "reference_trainer", "tests", "docs")
    files = [file for room in rooms for file in (ROOT / room).rglob("*.py")]
    first = {str(f.relative_to(ROOT)): f.read_text()[3:].split(maxsplit=1)[:1] for f in files}
    clauses = ("What", "How", "Which", "Where", "When", "Who", "Whether", "Why")
    assert not [file for file, word in first.items() if word and word[0] in clauses]


def test_the_newest_entry_of_the_changelog_is_the_version():
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    newest = re.search(
        r"^## \[(\S+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert newest[1] == version
