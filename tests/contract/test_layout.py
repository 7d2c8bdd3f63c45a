"""The layout of the package: which room is above which, how deep imports go, how large files and functions are.

``FLOORS`` is the home of the structure: a new folder or file at the root gets a line there and on the map of
CONTRIBUTING.md. The measures are
in ``tests/helpers/structure.py``, which prints them as a table; wrong examples at the end show that each check can fail.
"""

import ast
import functools
import re
import statistics
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest

from symbiotic_titan.registry import Registry
from tests.helpers.structure import (
    PACKAGE,
    ROOT,
    Graph,
    circles,
    count_lines,
    functions,
    import_graph,
    imported_modules,
    imports_of,
    is_part_of,
    longest_chain,
    module_of,
    percentile,
    read_package,
    room_graph,
    room_of,
    two_way_arrows,
)

# From the ground up. A room (a folder, a nested folder or a file at the root) imports rooms of lower floors only.
FLOORS: tuple[dict[str, str], ...] = (
    {
        "device": "the one place that decides the device and prepares torchtitan for a CPU",
        "moved": "old import paths that the documentation named, with a warning",
        "process": "its rank, the terminal, and how a command ends on a user's mistake",
        "registry": "parts that a config chooses by name",
    },
    {
        "signals": "stop signals: what they do at which moment, and how the process ends",
        "sequence": "the contract between data and model: tasks, modalities, packed batch, positions",
    },
    {"config": "one dataclass per config section; loading, checking and saving a config"},
    {
        "data.formats": "random access to samples in tar shards, JSONL and Parquet",
        "flow": "the flow-matching path, timesteps, noise and the ODE solver",
        "optim": "parameter groups with their schedules and norms; the shield schedule",
    },
    {
        "moe": "the partitioned MoE: router, dispatch, grouped experts, gradient shield, routing metrics",
        "codecs": "images <-> latents: pixel, flux, autoencoder_kl",
    },
    {
        "data": "samples, tokenizers, mixture, packing, logical streams, loader, latent cache",
        "model": "decoder, ViT, latent embedding, flow head, masks, initial values, FLOPs",
        "plots": "reads the logs of runs and draws the figures of symbiotic plot",
    },
    {
        "losses": "loss terms: values, counts and weights; the loss of a step",
        "parallel": "expert parallel, activation checkpointing, compile, FSDP2; the dry run",
        "weights": "reading and writing tensors: distributed checkpoints, safetensors, compatibility",
        "hf.architectures": "released architectures: their config and tensor names in terms of ours",
    },
    {
        "hf": "import and export of released models, tensor by tensor",
        "build": "builds tokenizer, data loader, model and optimizer from a config",
    },
    {"checkpoint": "which checkpoint a run resumes from, and what it starts from"},
    {
        "inference": "a trained model without a trainer: loading, prompts, text, images, held-out losses",
        "reliability": "hurts runs as symbiotic reliability does, and judges what became of them",
    },
    {"evaluation": "runs suites of scores on checkpoints and keeps their results"},
    {
        "evaluation.suites": "the field's suites: CLIP score, FID, HPS v2, lm-eval, OCRBench, prompt sets",
        "partition": "profile the experts, plan a split, apply it to a checkpoint, evaluate it",
    },
    {
        "demo": "the demo world: its data, its scores and its suite",
        "training": "the trainer, the checks before a run, metrics, validation, sample grids",
        "extend": "register parts of your own; docs/extending.md shows how",
    },
    {"study": "the paper's comparison: its runs, what they say to each claim, the page"},
    {
        "extensions": "optional parts, registered as a third party would",
        "commands": "one module per subcommand of symbiotic",
    },
    {
        "train": "the entry point of a training run; what a mistake in the config prints",
        "cli": "the symbiotic command: finds the subcommand and runs it",
    },
)

DEEPEST = 14
SHORTEST_FILE, LONGEST_FILE = 40, 400
FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_LONGEST = 10, 40, 90

# Where torchtitan may be imported: whole rooms and single files.
TORCHTITAN_EDGE = {
    *("build", "checkpoint", "commands", "config", "extensions", "parallel", "train", "training"),
    *("data/loader.py", "data/tokenizer.py", "inference/loaded_model.py"),
    *("model/args.py", "model/symbiotic.py", "optim/build.py", "optim/lr_schedule.py"),
}

# Rooms that know neither ranks nor meshes, and the files in them that must tell a sharded parameter from a plain one.
WITHOUT_RANKS = {"config", "sequence", "flow", "moe", "model", "losses"}
SEES_SHARDS = {"model/initialize.py", "moe/kernels.py"}

# The one change of sys.path: experimental.custom_import also looks in the current directory.
CHANGES_PATH = {f"{PACKAGE}/config/extension.py"}

FILES = read_package(ROOT / PACKAGE)
GRAPH = import_graph(FILES)
ROOMS = {room: targets - {""} for room, targets in room_graph(FILES).items() if room}


# ---- checks ---------------------------------------------------------------------------------------------------------------


def floor_of(floors: tuple[dict[str, str], ...]) -> dict[str, int]:
    return {room: number for number, floor in enumerate(floors) for room in floor}


def arrows_that_do_not_go_down(rooms: Graph, floors: tuple[dict[str, str], ...]) -> list[str]:
    floor = floor_of(floors)
    return [
        f"{room} imports {target}"
        for room in sorted(rooms)
        for target in sorted(rooms[room])
        if floor[target] >= floor[room]
    ]


def is_table(source: str) -> bool:
    """Whether a file holds data only: a docstring, imports and assignments, no function or class."""
    data = (ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom)
    return all(
        isinstance(node, data)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.parse(source).body
    )


def files_of_wrong_size(files: Mapping[str, str]) -> dict[str, int]:
    sizes = {
        path: count_lines(source)
        for path, source in files.items()
        if not path.endswith("__init__.py") and not is_table(source)
    }
    return {path: n for path, n in sizes.items() if not SHORTEST_FILE <= n <= LONGEST_FILE}


def on_edge(path: str) -> bool:
    """Whether ``path``, relative to the package, may import torchtitan."""
    return path in TORCHTITAN_EDGE or room_of(path) in TORCHTITAN_EDGE


def registries(files: Mapping[str, str]) -> dict[str, str]:
    """Name of every variable that holds a ``Registry`` -> the file that makes it."""
    pattern = re.compile(r"^(\w+)(?:: [^=]+)? = Registry\(", re.MULTILINE)
    return {name: path for path, source in files.items() for name in pattern.findall(source)}


def registering_files(files: Mapping[str, str], registry: str) -> set[str]:
    """The file that makes the registry, and those that register in it."""
    adding = {path for path, source in files.items() if f"{registry}.register" in source}
    return adding | {registries(files)[registry]}


def registered_twice(files: Mapping[str, str], registry: str) -> list[str]:
    """Names that ``registry.register("name"`` is called with in more than one place."""
    call = re.compile(rf'\b{registry}\.register\(\s*"(\w+)"')
    names = [name for source in files.values() for name in call.findall(source)]
    return sorted({name for name in names if names.count(name) > 1})


@functools.cache  # asked for each registry anew; parsing all files takes a second
def strings_together(source: str) -> tuple[tuple[int, list[str]], ...]:
    """Line and strings of every tuple, list, set, dict's keys or ``Literal[...]`` that holds strings only."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts: list[ast.expr | None] = [*node.elts]
        elif isinstance(node, ast.Dict):
            parts = [*node.keys]
        else:
            continue
        values = [part.value for part in parts if isinstance(part, ast.Constant)]
        strings = [value for value in values if isinstance(value, str)]
        if len(strings) == len(parts):
            found.append((node.lineno, strings))
    return tuple(found)


def listed_again(files: Mapping[str, str], homes: set[str], names: set[str]) -> list[str]:
    """Places outside ``homes`` that list two or more of ``names``, and nothing else."""
    return [
        f"{path}:{line}: {', '.join(strings)}"
        for path, source in files.items()
        if path not in homes
        for line, strings in strings_together(source)
        if len(strings) > 1 and set(strings) <= names
    ]


# ---- rooms ----------------------------------------------------------------------------------------------------------------


def test_every_room_stands_on_one_floor_with_a_sentence():
    listed = [room for floor in FLOORS for room in floor]
    assert sorted(listed) == sorted(ROOMS)
    assert all(sentence for floor in FLOORS for sentence in floor.values())


def test_rooms_import_lower_floors_only():
    assert not arrows_that_do_not_go_down(ROOMS, FLOORS)


def test_no_two_rooms_import_each_other_and_no_files_form_a_circle():
    assert not two_way_arrows(ROOMS)
    assert not circles(ROOMS)
    assert not circles(GRAPH)


def test_imports_are_at_most_14_deep():
    chain = longest_chain(GRAPH)
    assert len(chain) <= DEEPEST, " <- ".join(chain)


# ---- sizes ----------------------------------------------------------------------------------------------------------------


def test_files_have_40_to_400_lines():
    assert not files_of_wrong_size(FILES)


def test_functions_are_short():
    lengths = {
        f"{path}:{name}": lines for path, text in FILES.items() for name, lines in functions(text)
    }
    assert statistics.median(lengths.values()) <= FUNCTION_MEDIAN
    assert percentile(lengths.values(), 0.9) <= FUNCTION_P90
    assert not {name: lines for name, lines in lengths.items() if lines > FUNCTION_LONGEST}


# ---- one home per fact ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> dict[str, set[str]]:
    """Registry -> the names of our own parts in it."""
    for path, source in FILES.items():
        if re.search(r"\bRegistry\(|\.register\(", source):
            import_module(f"{PACKAGE}.{module_of(path)}")
    found: dict[str, set[str]] = {}
    for name, path in registries(FILES).items():
        registry = getattr(import_module(f"{PACKAGE}.{module_of(path)}"), name)
        assert isinstance(registry, Registry)
        found[name] = set(registry)
    assert found
    return found


def test_every_registry_has_parts_and_registers_each_in_one_place(parts):
    assert not [registry for registry, names in parts.items() if not names]
    assert not [name for registry in parts for name in registered_twice(FILES, registry)]


def test_registered_names_are_not_listed_again(parts):
    again = {
        registry: found
        for registry, names in parts.items()
        if (found := listed_again(FILES, registering_files(FILES, registry), names))
    }
    assert not again


def test_no_file_depends_on_the_order_of_imports():
    paths = [p for folder in (PACKAGE, "tools", "tests") for p in (ROOT / folder).rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    pattern = re.compile(r"sys\.path\.[i]nsert|noqa: [E]402")
    assert {name for name, source in sources.items() if pattern.search(source)} <= CHANGES_PATH


# ---- who may know what ----------------------------------------------------------------------------------------------------


def test_torchtitan_is_imported_at_the_edge_only():
    importing = {path for path, source in FILES.items() if imports_of(source, "torchtitan")}
    assert not {path for path in importing if not on_edge(path)}
    unused = TORCHTITAN_EDGE - importing - {room_of(path) for path in importing}
    assert not unused, "the table allows more than the code needs"


def test_parts_that_know_no_ranks_import_no_distributed_torch():
    importing = {
        path
        for path, source in FILES.items()
        if room_of(path) in WITHOUT_RANKS and imports_of(source, "torch.distributed")
    }
    assert importing == SEES_SHARDS
    for path in SEES_SHARDS:
        modules = {module for module, _ in imported_modules(FILES[path])}
        distributed = {m for m in modules if is_part_of(m, "torch.distributed")}
        assert distributed == {"torch.distributed.tensor"}


def test_config_classes_know_no_torch():
    assert not [p for p in FILES if room_of(p) == "config" and imports_of(FILES[p], "torch")]


# ---- the checks themselves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "from symbiotic_titan.model.args import ModelArgs",
        "import symbiotic_titan.model.args",
        "from symbiotic_titan.model import args",
        "def f():\n    from symbiotic_titan.model import args",
    ],
)
def test_an_import_is_seen_in_every_form(statement):
    files = {"data/loader.py": statement, "model/args.py": "", "model/__init__.py": ""}
    assert import_graph(files)["data.loader"] == {"model.args"}
    assert room_graph(files) == {"data": {"model"}, "model": set()}
    assert arrows_that_do_not_go_down(room_graph(files), ({"data": ""}, {"model": ""}))
    assert arrows_that_do_not_go_down(room_graph(files), ({"data": "", "model": ""},))
    assert not arrows_that_do_not_go_down(room_graph(files), ({"model": ""}, {"data": ""}))


def test_circles_and_chains_are_seen():
    files = {
        "a/x.py": "from symbiotic_titan.b import y",
        "b/y.py": "def f():\n    import symbiotic_titan.a.z",
        "a/z.py": "",
    }
    assert two_way_arrows(room_graph(files)) == [("a", "b")]
    assert not circles(import_graph(files))
    assert longest_chain(import_graph(files)) == ["a.x", "b.y", "a.z"]
    files["a/z.py"] = "from symbiotic_titan.a import x"
    assert circles(import_graph(files)) == [["a.x", "a.z", "b.y"]]
    assert len(longest_chain(import_graph(files))) <= 3
    assert circles(room_graph(files | {"b/y.py": ""})) == []


def test_nested_folders_and_files_at_the_root_are_rooms():
    places = ("build.py", "data/loader.py", "data/formats/shard.py")
    assert [room_of(place) for place in places] == ["build", "data", "data.formats"]


def test_a_file_of_wrong_size_is_seen():
    function = "def f():\n    pass\n"
    files = {
        "short.py": function,
        "long.py": function * 201,
        "right.py": function * 20,
        "face/__init__.py": function,
        "legend.py": '"""Letters."""\n',
        "table.py": "from x import y\n\nROWS = [1, 2]\n",
    }
    assert files_of_wrong_size(files) == {"short.py": 2, "long.py": 402}


def test_a_long_function_is_seen():
    assert list(
        functions("class A:\n    @cache\n    def f(self):\n        a = 1\n        return a")
    ) == [("f", 3)]
    assert percentile(range(1, 11), 0.9) == 10 and percentile([3], 0.9) == 3


def test_a_name_written_again_is_seen():
    files = {
        "home.py": 'KINDS: Registry[int] = Registry("kind")\nKINDS.register("a", 1)\nKINDS.register("b", 2)\n',
        "choices.py": 'Kind = Literal["a", "b"]\nDEFAULT = "a"\nOTHERS = ("a", "x")\n',
        "again.py": 'KINDS.register("b", 3)\n',
    }
    assert registries(files) == {"KINDS": "home.py"}
    assert registered_twice(files, "KINDS") == ["b"]
    homes = registering_files(files, "KINDS")
    assert homes == {"home.py", "again.py"}
    assert listed_again(files, homes, {"a", "b"}) == ["choices.py:1: a, b"]


def test_the_edge_is_made_of_rooms_and_files():
    assert not on_edge("model/decoder.py") and not on_edge("data/formats/shard.py")
    assert on_edge("train.py") and on_edge("config/job.py") and on_edge("model/args.py")
    assert imports_of("from torch import distributed", "torch.distributed")
    assert not imports_of("import torchtitan", "torch")
    assert Path(ROOT, PACKAGE).is_dir()
