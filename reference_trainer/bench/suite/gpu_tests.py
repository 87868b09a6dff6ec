"""Stage 2: the tests that need a GPU."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes

_ROOT = Path(__file__).parents[3]
_FILES = ("tests/core/test_cuda.py", "tests/core/optim/test_optimizer_table.py")


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Run only the named test files, because others need packages that may be absent."""
    absent = [name for name in _FILES if not (_ROOT / name).is_file()]
    if absent:
        raise FileNotFoundError(f"the tests must be next to the package; {absent[0]} is missing")
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.xml"
        options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={found}"]
        command = [sys.executable, "-m", "pytest", *options, *_FILES]
        subprocess.run(command, cwd=_ROOT, check=False)
        cases = list(ElementTree.parse(found).getroot().iter("testcase"))
    states = [_state(case) for case in cases]
    for state in ("passed", "failed", "skipped"):
        report.measured(f"tests: {state}", states.count(state), "tests")
    failed = [
        case.get("name") for case, state in zip(cases, states, strict=True) if state == "failed"
    ]
    if failed:
        raise ValueError(f"every test must pass; failed: {failed}")
    if not cases or (device.type == "cuda" and "passed" not in states):
        raise ValueError(f"at least one test must run; found {len(cases)}, and none ran")


def _state(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"
