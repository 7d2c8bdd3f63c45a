"""Words of the settings page, which is made from the config classes."""

from typing import Literal

import pytest
from settings_page import all_keys, linked, meanings_of, range_words, toml, type_words

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.losses import Losses
from symbiotic_titan.config.optimizer import Optimizer
from symbiotic_titan.config.rows import Range
from symbiotic_titan.config.upstream import settings


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (["a", "b"], '["a", "b"]'),
        (None, ""),
        (0.5, "0.5"),
        (100_000_000, "100_000_000"),
        ("x", '"x"'),
    ],
)
def test_defaults_are_written_as_toml(value, text):
    assert toml(value) == text


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "integer"),
        (int | None, "integer"),
        (float | int, "number"),
        (list[str], "list, each item text"),
        (dict[str, float], "table, each value number"),
        (Literal["a", "b"], 'one of `"a"`, `"b"`'),
        (Literal["a"], 'only `"a"`'),
    ],
)
def test_types_are_named_as_toml_has_them(annotation, words):
    assert type_words(annotation) == words


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Range(1, 4096), "from 1 to 4,096"),
        (Range(0), "at least 0"),
        (Range(0, 1, "[)"), "at least 0 and below 1"),
        (Range(0, ends="(]"), "above 0"),
        (Range(2, 10, also={0: "all"}), "from 2 to 10, or 0 (all)"),
        (Range(), ""),
    ],
)
def test_ranges_in_words(rule, words):
    assert range_words(rule) == words


def test_meanings_are_those_of_the_nearest_class():
    found = meanings_of(Optimizer)
    assert found["lr"] == "Learning rate of groups that set none."
    assert found["early_step_in_backward"].strip().startswith("Whether to apply")
    assert meanings_of(Losses)["text"] == "Weight of the next-token cross entropy."


def test_every_key_has_a_meaning():
    keys = {key.name: key for keys in all_keys().values() for key in keys}
    assert not {name for name, _ in settings(JobConfig)} - set(keys)
    assert not [name for name, key in keys.items() if not key.meaning]


def test_keys_in_sentences_are_links():
    targets = {"data.seed", "data.lookahead", "ema"}
    text = linked("`data.seed`, `lookahead`, [ema] and `other`", targets, "data.sources")
    assert text == (
        "[`data.seed`](#data.seed), [`lookahead`](#data.lookahead), [`[ema]`](#ema) and `other`"
    )
