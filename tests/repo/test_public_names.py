"""The public surface: listed once, keyword-only beyond the subject, documented with an example."""

import inspect
import re
from pathlib import Path

import pytest

import relora_core as relora

NAMES = sorted(relora.__all__)
CALLABLES = [getattr(relora, name) for name in NAMES]
PLAIN_DATA = {"ResetReport", "RestartReport", "Site"}  # what calls return: shown by them


def test_the_list_is_what_the_package_shows():
    shown = {n for n in vars(relora) if not n.startswith("_") and callable(vars(relora)[n])}
    assert shown == set(NAMES)


@pytest.mark.parametrize("public", CALLABLES, ids=NAMES)
def test_beyond_two_arguments_all_are_by_keyword(public):
    if inspect.isclass(public) and public.__name__ in PLAIN_DATA | {"JaggedCosine"}:
        return  # dataclasses: their fields
    kinds = [p.kind for p in inspect.signature(public).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2


@pytest.mark.parametrize("public", CALLABLES, ids=NAMES)
def test_each_is_documented_with_an_example_and_its_arguments(public):
    text = inspect.getdoc(public)
    assert text
    assert text.splitlines()[0].endswith(".")
    if public.__name__ not in PLAIN_DATA:
        assert ">>>" in text
    parameters = set(inspect.signature(public).parameters) - {"self", "model", "name", "state"}
    if len(parameters) > 1 and "see `" not in text:
        documented = set(re.findall(r"^    (\w+):", text, re.MULTILINE))
        assert parameters <= documented | {"optimizer"}


def test_in_place_functions_and_only_they_end_in_an_underscore():
    in_place = {name for name in NAMES if name.endswith("_")}
    assert in_place == {
        "add_low_rank_",
        "magnitude_prune_",
        "merge_",
        "random_prune_",
        "reinit_",
        "reset_optimizer_",
        "restart_",
        "split_bases_",
    }


def test_the_packages_say_that_they_are_typed():
    root = Path(relora.__file__).parents[1]
    assert (root / "relora_core/py.typed").is_file()
    assert (root / "reference_trainer/py.typed").is_file()
