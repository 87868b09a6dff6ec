"""Every Python block of the README and the docs runs, and every file they name exists."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import relora_core as relora
from relora_core import testing

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}
LINKED = (
    "https://arxiv.org/",
    "https://github.com/",
    "https://keepachangelog.com/",
    "https://zensical.org/",
)
ROOMS = {"tutorial", "how-to", "explanation", "reference"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.name
)
def test_the_blocks_of_a_page_run_as_written_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS[page], start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), space)


PROGRAM = re.compile(r"^```py\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_program_for_several_processes_runs_on_two(tmp_path):
    (program,) = PROGRAM.findall((ROOT / "docs/how-to/your-own-trainer.md").read_text())
    (tmp_path / "train.py").write_text(program)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    run = subprocess.run(
        [sys.executable, *torchrun],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged["1.0.weight"].shape == (64, 64)
    assert not [name for name in merged if "lora" in name]


def test_there_are_blocks_to_run():
    assert sum(map(len, BLOCKS.values())) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_the_one_that_its_results_give(page):
    """`python docs/draw.py` writes them."""
    script = runpy.run_path(str(ROOT / "docs" / "draw.py"))
    text = page.read_text()
    assert script["with_tables"](text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_names_that_are_documented_are_the_public_ones():
    for package, page in ((relora, "core"), (testing, "testing")):
        text = (ROOT / "docs/reference" / f"{page}.md").read_text()
        named = re.findall(rf"^::: {package.__name__}\.([\w.]+)$", text, re.MULTILINE)
        public = set(package.__all__)
        for room in {"examples", "strategies"} & public:
            public |= {f"{room}.{name}" for name in getattr(package, room).__all__}
            public.remove(room)
        assert sorted(named) == sorted(public)


def test_every_page_lies_in_a_room_and_in_the_navigation():
    site = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())
    named = re.findall(r"[\w/-]+\.md", str(site["nav"]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if "docs" in page.parts}
    assert sorted(named) == sorted(pages)
    assert {page.partition("/")[0] for page in pages} == {*ROOMS, "index.md"}


def test_the_site_is_built_without_a_warning(tmp_path):
    site = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())
    for plugin in site["plugins"]:
        if "mkdocstrings" in plugin:
            plugin["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "site.yml").write_text(yaml.safe_dump({**site, "site_dir": "site"}))
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "-f", "site.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    core = (tmp_path / "site/reference/core/index.html").read_text()
    for name in relora.__all__:
        assert f'id="relora_core.{name}"' in core
    assert "<math" in core
    for page in (tmp_path / "site").rglob("*.html"):
        for address in re.findall(r'(?:src|href)="(https?://[^"]+)"', page.read_text()):
            assert address.startswith(LINKED), f"{page.name}: {address}"
