"""The public surface: listed once, keyword-only beyond the subject, documented with an example."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import relora_core as relora
from relora_core import testing

PACKAGES = {
    "relora_core": relora,
    "testing": testing,
    "testing.examples": testing.examples,
    "testing.strategies": testing.strategies,
}
DATA = {"CI", "DEEP", "examples", "strategies"}
PUBLIC = pytest.mark.parametrize(
    "public",
    [
        pytest.param(getattr(package, name), id=f"{place}.{name}")
        for place, package in PACKAGES.items()
        for name in package.__all__
        if name not in DATA
    ],
)
# What calls return, raise or are given: shown by them.
PLAIN_DATA = {"ResetReport", "RestartReport", "Site", "Held", "LowRankSite"}
ERRORS = {"PropertyError", "OutOfStepError"}
NO_ARGUMENTS = {*ERRORS, "LowRankSite"}  # errors, and a protocol


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_the_list_is_what_the_package_shows(package):
    own = {n for n, value in vars(package).items() if callable(value) and not n.startswith("_")}
    if package is testing.examples:  # a module, which imports more than it shows
        own = {n for n in own if vars(package)[n].__module__ == package.__name__}
    assert own == set(package.__all__) - {"examples", "strategies"}


@PUBLIC
def test_beyond_two_arguments_all_are_by_keyword(public):
    if dataclasses.is_dataclass(public) or public.__name__ in NO_ARGUMENTS:
        return  # of a dataclass, its fields
    kinds = [p.kind for p in inspect.signature(public).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2


@PUBLIC
def test_each_is_documented_with_an_example_and_its_arguments(public):
    text = inspect.getdoc(public)
    assert text
    assert text.splitlines()[0].endswith(".")
    if public.__name__ not in PLAIN_DATA | ERRORS:
        assert ">>>" in text
    if public.__name__ in NO_ARGUMENTS:
        return
    parameters = set(inspect.signature(public).parameters) - {"self", "model", "name", "state"}
    if len(parameters) > 1 and "see `" not in text:
        documented = set(re.findall(r"^    (\w+):", text, re.MULTILINE))
        assert parameters <= documented | {"optimizer"}


def test_in_place_functions_and_only_they_end_in_an_underscore():
    in_place = {name for name in relora.__all__ if name.endswith("_")}
    assert in_place == {
        "add_low_rank_",
        "keep_merged_",
        "magnitude_prune_",
        "merge_",
        "random_prune_",
        "refresh_merged_",
        "reinit_",
        "reset_optimizer_",
        "restart_",
        "split_bases_",
    }


def test_the_packages_say_that_they_are_typed():
    root = Path(relora.__file__).parents[1]
    assert (root / "relora_core/py.typed").is_file()
    assert (root / "reference_trainer/py.typed").is_file()
