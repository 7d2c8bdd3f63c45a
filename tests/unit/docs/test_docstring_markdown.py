"""Docstrings as Markdown."""

import pytest
from commands_page import invocation, options_list, subparsers
from docstring_markdown import as_markdown, escaped
from griffe_lists import with_lists


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a <b> & ``<c>``", "a &lt;b> &amp; ``<c>``"),
        ("with --json, not '--fast'", "with `--json`, not '--fast'"),
        ("`--kept` as code", "`--kept` as code"),
    ],
)
def test_no_character_becomes_markup(text, markdown):
    assert escaped(text) == markdown


def test_examples_and_aligned_columns_keep_their_lines():
    text = "Says.\n\nExamples: a --b\n          c --d\n\n    x.json    one\n    y.json    two\n"
    assert as_markdown(text) == (
        "Says.\n\nExamples:\n\n```text\na --b\nc --d\n```\n\n```text\nx.json    one\ny.json    two\n```"
    )


def test_names_with_explanations_become_a_list():
    text = "One layer.\n\ndim, width:  of a token,\n             or more.\ntop_k:       experts."
    assert as_markdown(text).endswith("- `dim, width`: of a token, or more.\n- `top_k`: experts.")
    shapes = "tokens (B, T) int64   ids\nspan   (B, T) int64   images"
    assert as_markdown(shapes) == "- `tokens`: (B, T) int64: ids\n- `span`: (B, T) int64: images"


def test_a_list_after_an_introduction_is_a_list():
    assert as_markdown("Choices:\n- 'a': one\n- 'b': two") == "Choices:\n\n- 'a': one\n- 'b': two"


def test_sections_of_a_docstring_stay_as_they_are():
    text = "Does.\n\nRaises:\n    ValueError: never."
    assert with_lists(text) == text


def test_options_are_listed_with_what_their_help_leaves_out():
    from argparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--size", nargs=2, type=int, default=[1, 2])
    parser.add_argument("--kind", choices=("a", "b"), default="a", help="%(default)s is fast")
    parser.add_argument("names", nargs="*")
    assert options_list(parser).split("\n\n") == [
        "`--out FOLDER`\n:   folder to write; must be given",
        "`--size SIZE SIZE`\n:   default `[1, 2]`",
        "`--kind KIND`\n:   a is fast; one of `a`, `b`; default `a`",
        "`names`\n:   see above",
    ]
    assert invocation(parser._actions[0]) == "-h, --help"
    assert subparsers(parser) == {}
