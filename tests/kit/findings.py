"""Findings of the kit on planted bugs, and the programs that repeat them."""

import re
import traceback

import pytest
import torch

from relora_core import testing


def found(check, *arguments, **options):
    """Return the report of the property that is broken."""
    with pytest.raises(testing.PropertyError) as caught:
        check(*arguments, **options)
    return str(caught.value)


def assert_code_repeats_it(report, *, figures=True):
    """Assert that the code in a report, run by itself, raises what the report says.

    To the last figure, unless the bug itself depends on torch's global generator.
    """
    said = report.splitlines()[1].strip()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the bug raises
        exec(compile(program(report), "counterexample", "exec"), {"__name__": "counterexample"})
    again = "".join(traceback.format_exception_only(caught.value))
    if not figures:
        said, again = (re.sub(r"\d[\d.e+-]*", "#", text) for text in (said, again))
    assert said
    assert said.rstrip(": ") in again


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def program(report):
    """Return the code in a report."""
    _, _, rest = report.partition("as code:\n\n")
    lines = rest.partition("\n\n  held:")[0].splitlines()
    return "\n".join(line[4:] for line in lines)
