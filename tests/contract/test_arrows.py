"""Who may import whom. The table is the rule; the tests compare it with the imports in the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "symbiotic_titan"

# Folder of the package -> what of ours it may import besides itself. Files at the root may import everything.
ARROWS = {
    "config": set(),
    "sequence": {"config"},
    "flow": {"config"},
    "moe": {"sequence", "config"},
    "optim": {"config"},
    "codecs": {"sequence", "config"},
    "data": {"sequence", "codecs", "config"},
    "model": {"sequence", "moe", "codecs", "config"},
    "losses": {"sequence", "moe", "config"},
    "backbones": {"model", "moe", "sequence", "config"},
    "parallel": {"model", "moe", "config", "device"},
    "checkpoint": {"backbones", "model", "moe", "sequence", "config"},
    "generation": {"checkpoint", "codecs", "config", "data", "flow", "model", "sequence"}
    | {"extend", "inference", "train_spec"},
    "evaluation": {
        "checkpoint",
        "codecs",
        "config",
        "data",
        "flow",
        "generation",
        "model",
        "moe",
        "sequence",
    }
    | {"inference", "validation"},
    "plots": {"moe", "sequence", "routing_report"},
    "extensions": {"extend", "optim", "config"},
}

# Where torchtitan may be imported, besides the files at the root: a whole folder, or single files.
TORCHTITAN_EDGE = {
    "config/",
    "parallel/",
    "checkpoint/",
    "data/loader.py",
    "data/tokenizer.py",
    "model/args.py",
    "model/symbiotic.py",
    "optim/build.py",
    "extensions/",
}

# Folders that know neither ranks nor meshes, and their two files that must tell a sharded parameter from a plain one.
WITHOUT_RANKS = {"config", "sequence", "flow", "moe", "model", "losses"}
SEES_SHARDS = {"model/initialize.py", "moe/precision.py"}


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names that ``source`` imports, anywhere in it; ``from a import b`` gives both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_part_of(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def our_rooms(source: str) -> set[str]:
    """First names below the package that ``source`` imports: folders, or files at the root."""
    modules = [m for m in imported_modules(source) if is_part_of(m, "symbiotic_titan")]
    rooms = {m.split(".")[1] for m in modules if "." in m}
    return rooms - {"__version__"}


def forbidden_rooms(folder: str, source: str) -> set[str]:
    return our_rooms(source) - ARROWS[folder] - {folder}


def on_edge(path: str) -> bool:
    """Whether the file ``path``, relative to the package, may import torchtitan."""
    return "/" not in path or path in TORCHTITAN_EDGE or path.split("/")[0] + "/" in TORCHTITAN_EDGE


def files_in_folders() -> list[Path]:
    files = sorted(PACKAGE.glob("*/**/*.py"))
    assert files
    return files


def test_every_folder_has_a_row_in_the_table():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ARROWS)


@pytest.mark.parametrize("folder", sorted(ARROWS))
def test_folder_imports_only_along_the_arrows(folder):
    wrong = {
        str(path.relative_to(ROOT)): rooms
        for path in (PACKAGE / folder).rglob("*.py")
        if (rooms := forbidden_rooms(folder, path.read_text()))
    }
    assert not wrong


def test_the_table_has_no_circle():
    seen: list[str] = []
    waiting = dict(ARROWS)
    while waiting:
        free = [f for f, targets in waiting.items() if not targets & waiting.keys()]
        assert free, f"these import each other: {sorted(waiting)}"
        seen += free
        waiting = {f: targets for f, targets in waiting.items() if f not in free}
    assert len(seen) == len(ARROWS)


def test_torchtitan_is_imported_at_the_edge_only():
    wrong = [
        str(path.relative_to(ROOT))
        for path in files_in_folders()
        if not on_edge(path.relative_to(PACKAGE).as_posix())
        and any(is_part_of(m, "torchtitan") for m in imported_modules(path.read_text()))
    ]
    assert not wrong


def test_parts_that_know_no_ranks_import_no_distributed_torch():
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in files_in_folders()
        if path.relative_to(PACKAGE).parts[0] in WITHOUT_RANKS
        and any(is_part_of(m, "torch.distributed") for m in imported_modules(path.read_text()))
    }
    assert importing == SEES_SHARDS
    for name in SEES_SHARDS:
        modules = imported_modules((PACKAGE / name).read_text())
        distributed = [m for m in modules if is_part_of(m, "torch.distributed")]
        assert all(is_part_of(m, "torch.distributed.tensor") for m in distributed)


def test_config_classes_know_no_torch():
    wrong = [
        path.name
        for path in (PACKAGE / "config").rglob("*.py")
        if any(is_part_of(m, "torch") for m in imported_modules(path.read_text()))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("data", "from symbiotic_titan.model.args import ModelArgs"),
        ("data", "import symbiotic_titan.model"),
        ("data", "from symbiotic_titan import model"),
        ("model", "def f():\n    from symbiotic_titan.data import packing"),
    ],
)
def test_a_forbidden_import_is_seen_in_every_form(folder, source):
    assert forbidden_rooms(folder, source) in ({"model"}, {"data"})
    assert not forbidden_rooms(folder, "from symbiotic_titan.sequence.batch import PackedBatch")
    assert not on_edge("model/decoder.py") and on_edge("trainer.py") and on_edge("config/job.py")
