"""Standard output holds lines, a bar is drawn on terminals only, and both can be turned off."""

import io
import logging
import re
import sys

import pytest

from reference_trainer.logging.console import hidden, log, open_terminal
from reference_trainer.main import main

RESULTS = re.compile(r"|held-out loss: .*|restarts: .*|rank of .*|model: .*|page: .*|picture: .*")
RESTART = r"step 11 of 20  relora +restart 1: 14 matrices merged, 9\d\.\d% of moments zeroed"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _restored():
    yield
    open_terminal(logging.INFO)


def trained(arguments, capsys):
    assert main(["train", *arguments]) == 0
    return capsys.readouterr()


class TestWithoutATerminal:
    def test_there_are_lines_only_without_colour_or_bar(self, tiny, capsys):
        out, err = trained(tiny, capsys)
        assert not re.search("[\r\x1b]", out + err)
        assert err == ""
        assert len(re.findall(r"^step +\d+ of 20  .*held-out loss \d\.\d{4}$", out, re.M)) == 6
        assert re.search(f"^{RESTART}$", out, re.M)

    def test_quiet_leaves_results_only(self, tiny, capsys):
        out, err = trained([*tiny, "--quiet"], capsys)
        assert err == ""
        assert [line for line in out.splitlines() if not RESULTS.fullmatch(line)] == []
        assert "model:" in out

    def test_verbose_has_a_line_for_each_logged_step_and_each_checkpoint(self, tiny, capsys):
        out, _ = trained([*tiny, "--verbose"], capsys)
        steps = re.findall(r"^step +(\d+) of 20 .*loss \S+, lr \S+, \S+ tokens/s$", out, re.M)
        assert [int(step) for step in steps] == list(range(20))
        assert len(re.findall(r"^written: .*step-000000(?:04|06|08|12|16|20)$", out, re.M)) == 6


def test_on_a_terminal_there_is_a_bar_unless_quiet(tiny, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["train", *tiny, "--name", "one"]) == 0
    assert "relora: " in sys.stderr.getvalue()
    assert "2 restarts" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["train", *tiny, "--name", "other", "--quiet"]) == 0
    assert sys.stderr.getvalue() == ""


def test_warnings_go_to_standard_error_however_quiet(capsys):
    open_terminal(logging.WARNING)
    log.info("step 1 of 2")
    log.warning("step 1: skipped")
    assert capsys.readouterr() == ("", "warning: step 1: skipped\n")
    assert hidden()


def test_quiet_and_verbose_exclude_each_other(capsys):
    assert main(["train", "--quiet", "--verbose"]) == 2
    assert "--verbose: not allowed with argument --quiet" in capsys.readouterr().err
