"""A suite's options on the command line: split from the config's, typed, explained."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from symbiotic_titan.evaluation.options import (
    explained_options,
    read_options,
    split_sections,
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


def read(*sections):
    return read_options([SUITE], sections)["mine"]


def test_options_of_suites_and_of_the_config_are_told_from_the_tools_own():
    arguments = "run --mine.rate 2 --data.x 64 other --mine.is-on=true --experts.no-shared --out o"
    sections, others = take_sections(arguments.split())
    assert others == ["run", "other", "--out", "o"]
    own, config = split_sections(sections, ["mine"])
    assert read(*own) == Options(rate=2.0, is_on=True)
    assert config == ["--data.x", "64", "--experts.no-shared"]
    assert split_sections(sections, []) == ([], sections)


@pytest.mark.parametrize("arguments", [["--mine.rate"], ["--mine.rate", "--mine.name", "x"]])
def test_an_option_of_a_suite_needs_a_value(arguments):
    with pytest.raises(ValueError, match="--mine.rate: needs a value"):
        read(*arguments)


def test_texts_become_values_of_the_options_types():
    given = "--mine.limit 3 --mine.rate=2 --mine.name 5 --mine.tasks b,c --mine.is_on true"
    assert read(*given.split()) == Options(3, 2, "5", ("b", "c"), True)
    assert read("--mine.tasks", '["b,c"]').tasks == ("b,c",)
    assert read("--mine.name=--x").name == "--x"
    assert read("--mine.limit", "3", "--mine.limit", "4").limit == 4
    assert read() == Options()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rat", "1", "^--mine: unknown key 'rat'; did you mean 'rate'"),
        ("limit", "many", "^--mine.limit: must be an integer, got 'many'"),
        ("is_on", "yes", "^--mine.is_on: must be true or false, got 'yes'"),
        ("rate", "-1", "^--mine.rate: must not be negative, got -1"),
        ("name", "bad", "^bad.txt: line 3"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_written(option, value, message, capsys):
    with pytest.raises(ValueError, match=message):
        read(f"--mine.{option}", value)
    assert capsys.readouterr() == ("", "")


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


def test_only_the_module_of_a_chosen_suite_is_imported():
    code = """
import sys
from symbiotic_titan.evaluation.suite import SUITES
assert not [m for m in sys.modules if ".suites." in m or m.startswith("symbiotic_titan.demo")]
for name in ("lm_eval", "demo_world"):
    assert SUITES[name].name == name
    assert "symbiotic_titan.evaluation.suites.fid" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
