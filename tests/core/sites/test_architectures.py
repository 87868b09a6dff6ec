"""Architectures of transformers keep their function: with sites, over a restart, exported."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

DOCS = Path(__file__).parents[3] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "architectures.py"))
BY_KIND = {one.kind: one for one in SCRIPT["ARCHITECTURES"]}
FEW = ["gpt2", "t5", "gpt_oss"]


def assert_sound(record):
    assert record["at_registration"] == 0
    assert record["at_restart"] < 1e-5
    assert record["reloaded"] < 1e-6
    assert record["site_entries"] > 0
    assert not record["idle"]
    assert not record["warnings"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FEW else pytest.mark.slow) for kind in BY_KIND]
)
def test_each_keeps_its_function(kind):
    record = SCRIPT["look_at"](BY_KIND[kind])
    assert_sound(record)
    assert record["architecture"] in SCRIPT["table"]([record])


def test_the_committed_results_are_of_all_and_sound():
    file = DOCS / "results/architectures/architectures.jsonl"
    _, *records = (json.loads(line) for line in file.read_text().splitlines())
    assert [record["architecture"] for record in records] == list(BY_KIND)
    assert len(records) >= 35
    for record in records:
        assert_sound(record)
