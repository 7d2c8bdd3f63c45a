"""Registries: names once, built-in parts imported when they are asked for, messages for what is wrong."""

import sys

import pytest

from symbiotic_titan.registry import Registry


def test_a_built_in_part_is_imported_when_it_is_asked_for_and_not_before():
    registry = Registry("section.key", {"late": "wave:open"})
    sys.modules.pop("wave", None)
    assert "late" in registry and list(registry) == ["late"] and "wave" not in sys.modules
    assert registry["late"] is sys.modules["wave"].open


def test_names_come_in_the_order_in_which_they_were_registered():
    registry = Registry("section.key", {"z": "math:pi"})
    registry.register("b", 1)
    registry.register("a", 2)
    assert list(registry) == ["z", "b", "a"] and len(registry) == 3


def test_a_name_is_taken_once_and_the_same_part_may_come_again():
    registry = Registry("section.key", {"pi": "math:pi"})
    part = object()
    assert registry.register("mine", part) is registry.register("mine", part) is part
    for name in ("mine", "pi"):
        with pytest.raises(ValueError, match=f"section.key: '{name}' is already registered"):
            registry.register(name, object())
    with pytest.raises(ValueError, match="section.key: the name of a part must be a text without"):
        registry.register("", part)


def test_an_unknown_name_lists_the_known_ones_and_the_way_to_add_one():
    registry = Registry("section.key", {"pi": "math:pi"})
    message = (
        "section.key = 'pie': nothing is registered under this name; choose from pi, or name the module that registers it "
        "in experimental.custom_import"
    )
    with pytest.raises(ValueError, match=message):
        registry["pie"]


def test_what_is_registered_temporarily_is_forgotten():
    registry = Registry("section.key", {"pi": "math:pi"})
    with registry.temporarily(mine=1):
        registry.register("other", 2)
        assert list(registry) == ["pi", "mine", "other"] and registry["pi"] > 3
    assert list(registry) == ["pi"] and registry["pi"] > 3
