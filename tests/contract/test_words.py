"""Private words do not come back: the field has standard terms for these things, or English has a plainer way to say them.

Searched are docstrings, comments and strings of the package and the tools, the pages, and the comments of the configs. Keys
that files and options keep (``num_lanes``, ``--probe``) are no words of prose: an underscore or a dash beside a word hides it.

    python tests/contract/test_words.py [PART OF A PATH]      # the places, per room
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.structure import PACKAGE, ROOT, room_of


@dataclass(frozen=True)
class Banned:
    """A regular expression for a word or a turn of phrase, what to write instead, and the files it is banned from."""

    pattern: str
    instead: str
    files: str = ""  # a regular expression for the path; everywhere by default

    def find(self, text: str) -> Iterator[re.Match[str]]:
        # Not inside a longer name: num_lanes, data/fill, --probe, `[probe]`.
        return re.finditer(rf"(?<![\w.\-/\[])(?:{self.pattern})(?![\w\-/])", text, re.IGNORECASE)


WORDS = (
    Banned("behind", "after, following, backed by"),
    Banned("nobody|nobody's", "'not registered', 'no one' where a person is meant"),
    Banned("by lot", "at random"),
    Banned(r"to be (generated|understood)", "target image, input image"),
    Banned("of which", "two sentences"),
    Banned(r"whether [^.;]{0,60}\bis there", "name what is checked: 'whether ... exists'"),
    Banned("banks?", "grouped experts"),
    Banned("lanes?", "stream"),
    Banned("rows? of tokens", "packed sequence"),
    Banned("recipes?", "pipeline spec; the converter's own term"),
    Banned("speech|speeches", "message", files="data|config|inference|hf"),
    Banned("pieces?", "parts, chunks, content parts"),
    Banned("ways", "schema; 'in two ways' -> 'twice', 'either ... or'"),
    Banned("identity|identities", "fingerprint", files="symbiotic_titan/data"),
    Banned(r"(?:the|row|rows'|mean|their|its|of) fill", "packing efficiency"),
    Banned("marks?", "special token; marker; sign"),
    Banned("transport|transported", "worker serialization"),
    Banned("extents?", "byte ranges"),
    Banned("arranged|arrangements?", "converter, weight mapping"),
    Banned("shape files?", "model config"),
    Banned("left behind", "unmapped"),
    Banned("kept mass|mass kept", "retained routing mass"),
    Banned("retention", "partition evaluation"),
    Banned("cells?", "latents", files="codecs|flow|model|inference|data"),
    Banned("canvas|canvases", "latent grid"),
    Banned(
        r"(?:draws?|drew|drawn) (?:\w+ ){0,3}(?:images?|pictures?|texts?|answers?)",
        "generate",
        files="(?!.*plot)",
    ),
    Banned(r"(?:images?|pictures?|texts?|answers?|prompts?) (?:\w+ ){0,2}drawn", "generated"),
    Banned("laws?", "distribution"),
    Banned("subjects?", "evaluation target", files="evaluation|demo"),
    Banned("claims?", "parsed caption", files="symbiotic_titan/(demo|evaluation)"),
    Banned("probes?|probed|probing", "ablation"),
    Banned("aside", "paused"),
)

# Names of classes and functions that had a standard name.
NAMES = {
    "FlatRow": "worker serialization",
    "Arranged": "WeightMapping",
    "StoredModel": "CheckpointReader",
    "TensorKind": "TensorSpec",
    "Place": "TensorSlice",
    "KeptMass": "RetainedRoutingMass",
    "Canvas": "LatentGrid",
    "Watch": "a progress callback",
    "Speech": "Message",
    "send_back": "start_combine",
    "left_behind": "unmapped tensors",
    "LEFT_BEHIND": "unmapped tensors",
}

# (part of a path, expression for the line) -> why it may stay.
ALLOWED: dict[tuple[str, str], str] = {
    ("symbiotic_titan/evaluation/", r'"probe"'): "a key of result files",
    ("", r"by_lot"): "a key of plan files",
    ("docs/evaluation.md", "per subject"): "MMLU's subjects",
    ("config/job.py", r"recipe = 'tensorwise'"): "a key of [float8]",
    ("", "question marks?"): "punctuation",
    ("", r'^"(lanes|identity)"$'): "keys of the saved data state",
}

# Rooms whose words are still being changed; a room leaves this set when its test passes, and does not come back.
UNFINISHED: set[str] = set()


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every comment and every line of a string."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
        elif token.type == tokenize.STRING or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1):
            yield from enumerate(token.string.splitlines(), start=token.start[0])


def prose_of(path: Path) -> list[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return list(prose_of_python(text))
    lines = list(enumerate(text.splitlines(), start=1))
    if path.suffix == ".md":
        return lines
    return [(number, line.partition("#")[2]) for number, line in lines if "#" in line]


def files_of_prose() -> list[Path]:
    package = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    pages = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")]
    pages += (ROOT / "docs").rglob("*.md")
    pages += [*(ROOT / "docs").rglob("*.py"), *(ROOT / "benchmarks").glob("*.md")]
    scripts = [ROOT / "run_train.sh", *(ROOT / "tools").glob("*.sh")]
    return sorted({*package, *pages, *scripts, *(ROOT / "train_configs").rglob("*.toml")})


def place_of(path: Path) -> str:
    """Room of the package, or the folder or file at the root."""
    below = path.relative_to(ROOT).as_posix()
    if below.startswith(PACKAGE + "/"):
        return room_of(below.removeprefix(PACKAGE + "/")) or PACKAGE
    return below.partition("/")[0]


def is_allowed(path: str, line: str) -> bool:
    return any(part in path and re.search(words, line) for part, words in ALLOWED)


def banned_words(path: str, prose: list[tuple[int, str]]) -> list[str]:
    return [
        f"{path}:{number}: {match[0]!r} ({banned.instead}): {line.strip()[:160]}"
        for number, line in prose
        if not is_allowed(path, line)
        for banned in WORDS
        if re.search(banned.files, path)
        for match in banned.find(line)
    ]


def banned_names(path: str, source: str) -> list[str]:
    defined = (ast.ClassDef, ast.FunctionDef)
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, defined)]
    return [f"{path}:{n.lineno}: {n.name} ({NAMES[n.name]})" for n in found if n.name in NAMES]


def hits_of(paths: list[Path]) -> list[str]:
    found: list[str] = []
    for path in paths:
        below = path.relative_to(ROOT).as_posix()
        found += banned_words(below, prose_of(path))
        if path.suffix == ".py":
            found += banned_names(below, path.read_text())
    return found


def places() -> dict[str, list[Path]]:
    grouped: dict[str, list[Path]] = {}
    for path in files_of_prose():
        grouped.setdefault(place_of(path), []).append(path)
    return grouped


PLACES = places()


@pytest.mark.parametrize("place", sorted(PLACES))
def test_no_banned_word_stands_in(place, request):
    if place in UNFINISHED:
        request.applymarker(pytest.mark.xfail(strict=False, reason="words being changed"))
    hits = hits_of(PLACES[place])
    assert not hits, "\n".join(hits)


def test_only_unfinished_places_that_exist_are_excused():
    assert UNFINISHED <= PLACES.keys()


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("What stands behind the image", "behind"),
        ("A lane of the data", "lane"),
        ("images to be generated", "to be generated"),
        ("whether such a file is there", "whether such a file is there"),
        ("Expert banks.", "banks"),
        ("it draws four images", "draws four images"),
    ],
)
def test_a_banned_word_is_seen(line, word):
    (hit,) = banned_words("README.md", [(1, line)])
    assert repr(word) in hit


@pytest.mark.parametrize(
    "line",
    [
        "data.num_lanes = 4",
        "the option --probe and the metric data/fill",
        "a SentencePiece model",
        "planes and airlines",
        "matplotlib draws the curves",
    ],
)
def test_keys_and_longer_words_are_left_alone(line):
    assert not banned_words("README.md", [(1, line)])


def test_comments_docstrings_and_strings_are_read_and_code_is_not():
    source = 'lane = 1  # a lane\n\n\ndef f():\n    """One lane."""\n    raise E(f"lane {lane}")\n'
    assert [number for number, _ in prose_of_python(source)] == [1, 5, 6]
    assert len(banned_words("x.py", list(prose_of_python(source)))) >= 3
    assert banned_names("x.py", "class Canvas: ...") == ["x.py:1: Canvas (LatentGrid)"]


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    for place, paths in sorted(PLACES.items()):
        hits = hits_of([path for path in paths if part in path.as_posix()])
        print(f"{place}: {len(hits)}", *(f"  {hit}" for hit in hits if part), sep="\n")


if __name__ == "__main__":
    main()
