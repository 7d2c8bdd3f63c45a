"""A suite's options on the command line: split from the config's, typed, explained."""

from dataclasses import dataclass

import pytest

import symbiotic_titan.demo.suite  # noqa: F401 (registers itself)
import symbiotic_titan.evaluation.suites.builtin  # noqa: F401 (registers ours)
from symbiotic_titan.evaluation.options import (
    explained_options,
    read_options,
    split_suites,
    take_sections,
)
from symbiotic_titan.evaluation.suite import SUITES, Suite


@dataclass(frozen=True)
class Base:
    limit: int | None = None
    """How many"""


@dataclass(frozen=True)
class Options(Base):
    rate: float = 1.0
    """How fast"""

    name: str = "x"
    tasks: tuple[str, ...] = ("a",)
    """What to do"""

    is_on: bool = False

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate: must not be negative, got {self.rate:g}")
        if self.name == "bad":
            raise ValueError("bad.txt: line 3: column 'answer' is missing")


SUITE = Suite("mine", "a suite", Options, lambda *arguments: {})


def test_options_of_suites_and_of_the_config_are_told_from_the_tools_own():
    arguments = "run --mine.rate 2 --data.x 64 other --mine.is-on=true --experts.no-shared --out o"
    sections, others = take_sections(arguments.split())
    assert others == ["run", "other", "--out", "o"]
    given, config = split_suites(sections, ["mine"])
    assert given == {"mine": {"rate": "2", "is_on": "true"}}
    assert config == ["--data.x", "64", "--experts.no-shared"]


@pytest.mark.parametrize("arguments", [["--mine.rate"], ["--mine.rate", "--mine.name", "x"]])
def test_an_option_of_a_suite_needs_a_value(arguments):
    sections, _ = take_sections(arguments)
    with pytest.raises(ValueError, match="--mine.rate: needs a value"):
        split_suites(sections, ["mine"])


def test_texts_become_values_of_the_options_types():
    given = {"limit": "3", "rate": "2", "name": "5", "tasks": "b,c", "is_on": "true"}
    assert read_options(SUITE, given) == Options(3, 2, "5", ("b", "c"), True)
    assert read_options(SUITE, {"tasks": '["b,c"]'}).tasks == ("b,c",)
    assert read_options(SUITE, {}) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rat": "1"}, "^--mine: unknown key 'rat'; did you mean 'rate'"),
        ({"limit": "many"}, "^--mine.limit: must be an integer, got 'many'"),
        ({"is_on": "yes"}, "^--mine.is_on: must be true or false, got 'yes'"),
        ({"rate": "-1"}, "^--mine.rate: must not be negative, got -1"),
        ({"name": "bad"}, "^bad.txt: line 3"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_written(given, message):
    with pytest.raises(ValueError, match=message):
        read_options(SUITE, given)


def test_options_are_explained_by_the_sentences_below_them():
    explained = {option.name: option for option in explained_options(SUITE)}
    assert explained["limit"].sentence == "How many" and explained["rate"].default == 1.0
    assert explained["name"].sentence == "" and explained["tasks"].sentence == "What to do"


def test_every_option_of_our_suites_has_a_default_and_a_sentence():
    assert "demo_world" in SUITES
    for name in SUITES:
        assert SUITES[name].name == name and SUITES[name].description
        assert bool(SUITES[name].modules) == bool(SUITES[name].install)
        for option in explained_options(SUITES[name]):
            assert option.sentence, f"--{name}.{option.name}"


def test_a_suite_whose_extra_is_missing_says_how_to_install_it():
    suite = Suite("far", "", Options, lambda *a: {}, ("json", "no_such"), "pip install no-such")
    with pytest.raises(
        ValueError, match="--suite far: needs no_such; install it: pip install no-such"
    ):
        suite.check_installed()
