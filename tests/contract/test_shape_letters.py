"""Tensor names end in the letters of ``sequence/shapes.py``, the only legend of the project."""

import io
import re
import tokenize
from collections import Counter

from symbiotic_titan.sequence import shapes
from tests.helpers.structure import ROOT

SUFFIX = re.compile(r"_?[a-z]\w*_([A-Z][A-Za-z0-9]{0,4})")
FILES = sorted(
    path
    for folder in ("symbiotic_titan", "tests", "tools")
    for path in (ROOT / folder).rglob("*.py")
)


def legend() -> Counter[str]:
    """How often the legend explains each letter."""
    return Counter(re.findall(r"^    (\w)   ", shapes.__doc__ or "", re.MULTILINE))


def unknown_letters(source: str, known: set[str]) -> set[str]:
    """Names in ``source`` whose suffix has a letter that is not ``known``."""
    names = {
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME
    }
    return {
        name
        for name in names
        if (suffix := SUFFIX.fullmatch(name)) and set(re.sub(r"\d", "", suffix[1])) - known
    }


def test_every_letter_has_one_meaning():
    counts = legend()
    assert len(counts) > 20 and set(counts.values()) == {1}


def test_names_end_in_letters_of_the_legend():
    known = set(legend())
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in unknown_letters(path.read_text(encoding="utf-8"), known)
    }
    assert not found, (
        f"explain the letter in sequence/shapes.py, or use one that is there: {sorted(found)}"
    )


def test_an_unknown_letter_is_found():
    assert unknown_letters("x_TD = y_T1 = 1\nw_EOF = 2\nleft_out = 3\n", {"T", "D", "E", "F"}) == {
        "w_EOF"
    }


def test_no_file_has_a_legend_of_its_own():
    legends = [
        str(path.relative_to(ROOT))
        for path in FILES
        if re.search(r"^(\"\"\")?Letters: ", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not legends, f"say it in sequence/shapes.py: {legends}"
