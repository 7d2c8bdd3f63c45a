#!/usr/bin/env python3
"""Measures the structure of a checkout: sizes, imports, rooms. tests/contract/test_layout.py holds the code to bounds on them.

    python tests/helpers/structure.py [CHECKOUT ...]      # a table with one column per checkout; this one by default

A *room* is a folder of the package (nested folders are rooms of their own) or a file at its root. Every import counts,
wherever it stands: one inside a function ties two files together as much as one at the top.
"""

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "symbiotic_titan"
Graph = Mapping[str, frozenset[str]]

IMPORT_TRAIN = f"""
import os, sys, time
os.environ.pop("LOCAL_RANK", None)
start = time.perf_counter()
from {PACKAGE}.signals import StopRequest
from {PACKAGE}.train import run
try:
    run([], StopRequest())
except ValueError:  # no rank is set, which is found once everything is imported
    pass
print(time.perf_counter() - start, *sys.modules)
"""


# ---- imports --------------------------------------------------------------------------------------------------------------


def imported_modules(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in ``source``; the name is "" for ``import module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((str(node.module), alias.name) for alias in node.names)


def is_part_of(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports_of(source: str, package: str) -> bool:
    """Whether ``source`` imports ``package`` or something below it."""
    return any(
        is_part_of(f"{module}.{name}" if name else module, package)
        for module, name in imported_modules(source)
    )


def read_package(folder: Path) -> dict[str, str]:
    """Path relative to ``folder``, such as ``data/loader.py`` -> source."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*.py"))}


def module_of(path: str) -> str:
    """``data/loader.py`` -> ``data.loader``, ``data/__init__.py`` -> ``data``, the package's own -> ""."""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def import_graph(files: Mapping[str, str]) -> Graph:
    """Module -> the modules of the package that its file imports, both without the package's name."""
    modules = {module_of(path): source for path, source in files.items()}

    def targets(source: str) -> Iterator[str]:
        for module, name in imported_modules(source):
            if is_part_of(module, PACKAGE):
                below = module.removeprefix(PACKAGE).lstrip(".")
                whole = f"{below}.{name}".strip(".")
                yield whole if whole in modules else below

    return {m: frozenset(targets(source)) & modules.keys() - {m} for m, source in modules.items()}


def room_of(path: str) -> str:
    """``data/formats/shard.py`` -> ``data.formats``; a file at the root is a room itself."""
    folder = path.rpartition("/")[0]
    return folder.replace("/", ".") or module_of(path)


def room_graph(files: Mapping[str, str]) -> Graph:
    """Room -> the other rooms that it imports."""
    room = {module_of(path): room_of(path) for path in files}
    found: dict[str, set[str]] = {name: set() for name in room.values()}
    for module, targets in import_graph(files).items():
        found[room[module]] |= {room[target] for target in targets}
    return {name: frozenset(targets - {name}) for name, targets in found.items()}


# ---- graphs ---------------------------------------------------------------------------------------------------------------


def reachable(graph: Graph, start: str) -> set[str]:
    """Everything that ``start`` imports, directly or not; itself only where it lies on a circle."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes each of which reaches the others."""
    reached = {node: reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted(n for n in reached[node] if node in reached[n]))
        for node in graph
        if node in reached[node]
    }
    return [list(group) for group in sorted(groups)]


def two_way_arrows(graph: Graph) -> list[tuple[str, str]]:
    return sorted(
        (a, b) for a, targets in graph.items() for b in targets if a < b and a in graph[b]
    )


def longest_chain(graph: Graph) -> list[str]:
    """The longest way along imports, importer first. Of a circle one arrow is left out, so that there is an end."""
    cut: dict[str, set[str]] = {node: set(targets) for node, targets in graph.items()}
    for circle in circles(graph):
        for position, node in enumerate(circle):
            cut[node] -= set(circle[: position + 1])

    @cache
    def chain(node: str) -> tuple[str, ...]:
        return (node, *max(map(chain, cut[node]), key=len, default=()))

    return list(max(map(chain, graph), key=len, default=()))


# ---- sizes ----------------------------------------------------------------------------------------------------------------


def count_lines(source: str) -> int:
    return len(source.splitlines())


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines, decorators left out, of every function, methods and nested ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, int(node.end_lineno or node.lineno) - node.lineno + 1


def percentile(values: Iterable[int], share: float) -> int:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


# ---- importing ------------------------------------------------------------------------------------------------------------


def import_train(root: Path) -> tuple[set[str], float]:
    """Modules that a training run imports before it reads its config, and the seconds that takes, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", IMPORT_TRAIN]
    seconds, *modules = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, check=True, text=True
    ).stdout.split()
    return set(modules), float(seconds)


def ours(modules: Iterable[str]) -> set[str]:
    return {module for module in modules if is_part_of(module, PACKAGE)}


# ---- the table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """Row name -> value, for one checkout."""

    rows: Mapping[str, str]


def measure_structure(root: Path, repeats: int = 5) -> Structure:
    """Reads the package below ``root`` and imports it ``repeats`` times."""
    files = read_package(root / PACKAGE)
    lengths = [lines for source in files.values() for _, lines in functions(source)]
    sizes = [n for source in files.values() if (n := count_lines(source)) > 1]
    graph, rooms = import_graph(files), room_graph(files)
    imports = [import_train(root) for _ in range(repeats)]
    arrows = sum(map(len, rooms.values()))
    return Structure(
        {
            "files": str(len(files)),
            "lines": str(sum(map(count_lines, files.values()))),
            "function lines, median / p90 / longest": _spread(lengths),
            "file lines, median / p90 / longest": _spread(sizes),
            "files under 40 lines, faces left out": str(sum(n < 40 for n in sizes)),
            "rooms / arrows between them": f"{len(rooms)} / {arrows}",
            "two-way arrows / circles of files": f"{len(two_way_arrows(rooms))} / {len(circles(graph))}",
            "import depth": str(len(longest_chain(graph))),
            "modules loaded by training": str(len(ours(imports[0][0]))),
            "seconds of its imports": f"{statistics.median(s for _, s in imports):.2f}",
        }
    )


def _spread(values: list[int]) -> str:
    return f"{statistics.median(values):g} / {percentile(values, 0.9)} / {max(values)}"


def markdown_table(columns: Mapping[str, Structure]) -> str:
    names = list(next(iter(columns.values())).rows)
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(column.rows[name] for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    roots = [Path(name).resolve() for name in sys.argv[1:]] or [ROOT]
    print(markdown_table({root.name: measure_structure(root) for root in roots}))


if __name__ == "__main__":
    main()
