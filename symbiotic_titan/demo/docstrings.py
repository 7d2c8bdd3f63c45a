"""Real English: the prose in the docstrings of Python's standard library. Modules are parsed, never imported."""

import ast
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from symbiotic_titan.data.order import hash_fraction, hash_key, permutation

# Share of the top-level packages whose text is in held-out files only.
HELDOUT_SHARE = 0.1
# Shorter docstrings are mostly headings and signatures.
MIN_CHARACTERS = 80
# A paragraph is prose when it is mostly letters and spaces, as code and tables are not.
MIN_LETTERS = 0.85
# Not part of every installation, or no text worth reading.
SKIPPED = ("test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "this")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library_texts(seed: int, heldout: bool) -> Iterator[dict[str, str]]:
    """{"text", "module"} of one side of the split, module by module in an order given by ``seed``; no text twice."""
    seen: set[str] = set()
    modules = [(name, path) for name, path in _modules() if _is_heldout(name) == heldout]
    for i in permutation(len(modules), hash_key("modules", seed)):
        name, path = modules[i]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
                text = prose(docstring)
                if len(text) >= MIN_CHARACTERS and text not in seen:
                    seen.add(text)
                    yield {"text": text, "module": name}


def _is_heldout(module: str) -> bool:
    """Decided by the top-level package, so that no package is on both sides."""
    return hash_fraction("module", module.partition(".")[0]) < HELDOUT_SHARE


def _modules() -> list[tuple[str, Path]]:
    """(dotted name, source file) of the standard library's Python modules, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sys.stdlib_module_names - set(SKIPPED)
    files = [root / f"{name}.py" for name in names if (root / f"{name}.py").is_file()]
    files += [path for name in names for path in (root / name).rglob("*.py")]
    parts = {path: path.relative_to(root).with_suffix("").parts for path in files}
    return sorted(
        (".".join(parts[path]), path) for path in files if not {*parts[path]} & {*SKIPPED, "tests"}
    )


def prose(docstring: str) -> str:
    """Paragraphs of ``docstring`` that are English sentences, each on one line."""
    paragraphs = [
        re.sub(r"\s+", " ", paragraph).strip()
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    ]
    return "\n".join(p for p in paragraphs if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    if ">>>" in paragraph or not paragraph.isascii() or not paragraph.endswith((".", "!", "?")):
        return False
    plain = sum(character.isalpha() or character in " .,'()" for character in paragraph)
    return paragraph[0].isupper() and plain >= MIN_LETTERS * len(paragraph)
