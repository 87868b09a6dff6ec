"""A check counts when it has been seen to fail: each planted breakage must be noticed.

A breakage is a patch in `breakages/`. It says which tests must notice it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BREAKAGES = sorted((ROOT / "tests/repo/breakages").glob("*.patch"))


def noticed_by(patch):
    return re.search(r"^Noticed by: (\S+)$", patch.read_text(), re.M)[1]


def test_each_is_noticed_by_tests_that_exist():
    assert len(BREAKAGES) > 100
    assert not [patch.name for patch in BREAKAGES if not (ROOT / noticed_by(patch)).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("patch", BREAKAGES, ids=lambda patch: patch.stem)
def test_the_suite_notices(patch, tmp_path):
    for name in ("relora_core", "reference_trainer", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", noticed_by(patch)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout[-3000:]
    assert "failed" in run.stdout
    crashed = re.search(r"^E +(NameError|SyntaxError|ImportError)", run.stdout, re.M)
    assert not crashed, run.stdout[-3000:]  # a breakage breaks a rule, and runs
