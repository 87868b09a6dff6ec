"""The built wheel can be installed without the repository, and works."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ["relora_core/py.typed", "reference_trainer/py.typed", "reference_trainer/report/page.html"]

RESTART = """
import torch
from torch import nn
import relora_core as relora

model = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
print(relora.restart_(model, optimizer).sites, relora.__file__)
"""


def run(command, cwd, **environment):
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the directory of a wheel and an sdist, the wheel built from the sdist."""
    place = tmp_path_factory.mktemp("built")
    run(["git", "clone", "-q", str(ROOT), "source"], place)
    run([sys.executable, "-m", "build", "--outdir", str(place / "dist"), "source"], place)
    return place / "dist"


@pytest.mark.slow
class TestWhatIsBuilt:
    def test_the_wheel_holds_both_packages_whole_and_nothing_else(self, built):
        (wheel,) = built.glob("*.whl")
        names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
        tracked = run(["git", "ls-files", "relora_core", "reference_trainer"], ROOT).split()
        assert names == set(tracked)
        assert set(DATA) <= names

    def test_the_sdist_holds_what_a_wheel_is_built_from_and_the_licence(self, built):
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {*DATA, "pyproject.toml", "LICENSE", "README.md"} <= names

    def test_it_runs_where_the_repository_is_not(self, built, tmp_path):
        (wheel,) = built.glob("*.whl")
        installed = tmp_path / "installed"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        run([*install, str(installed), str(wheel)], tmp_path)
        # Its requirements are those of this environment; it comes first.
        path = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"]])

        def python(*arguments):
            return run([sys.executable, *arguments], tmp_path, PYTHONPATH=path)

        assert python("-c", RESTART).split() == ["1", str(installed / "relora_core/__init__.py")]
        text = tmp_path / "text"
        text.mkdir()
        for number in range(20):
            (text / f"{number}.txt").write_text(f"{number} " * 200)
        size = (
            "--model.hidden_size 32 --model.intermediate_size 48 --model.layers 1 --model.heads 4"
        )
        few = "--steps 6 --relora.warm_start 2 --relora.every 2 --relora.warmup 1 --relora.rank 2"
        short = "--batch.length 16 --data.held_out 0.3 --data.files text/*.txt"
        trained = python("-m", "reference_trainer", "train", *f"{size} {few} {short}".split())
        assert "restarts: 1" in trained
        python("-m", "reference_trainer", "report", "runs/first-run")
        assert (tmp_path / "runs/first-run/report.html").is_file()
