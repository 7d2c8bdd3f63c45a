"""One way to open a stored model, whatever it is stored as.

Tensors that are made of other tensors by the links of a backbone, a link at a time.

A released model: a folder with config.json and safetensors files, read as one of ours.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.architectures.base import (
    Arrange,
    Backbone,
    Link,
)
from symbiotic_titan.hf.architectures.registry import backbone_of
from symbiotic_titan.model import model_config as shape_file
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.weights.compatibility import (
    absent_parts,
    part_of,
    tensors_of_model,
)
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from symbiotic_titan.weights.reader import (
    StoredModel,
    TensorKind,
    some_of,
    total_bytes,
)
from symbiotic_titan.weights.safetensors import (
    PlacedTensors,
    SafetensorsModel,
    fill,
    has_weights,
    places_in,
    read_places,
    read_table,
    write_file,
)


@dataclass(frozen=True)
class Recipe:
    """``made`` of ``parts`` by ``arrange``, each in the order of the names."""

    parts: tuple[str, ...]
    made: tuple[str, ...]
    arrange: Arrange


class Arranged:
    """What ``recipes`` make of the tensors that ``read`` gives.

    kinds  name -> kind of what is made, a recipe's side by side: asked for in this order, parts are read once.

    Raises:
        ValueError: parts of other shapes than their recipe can arrange.
    """

    def __init__(
        self,
        recipes: Iterable[Recipe],
        parts: Mapping[str, TensorKind],
        read: Callable[[str], Tensor],
    ) -> None:
        self._read = read
        self._recipe_of: dict[str, Recipe] = {}
        self._made: dict[str, Tensor] = {}
        self.kinds: dict[str, TensorKind] = {}
        for recipe in recipes:
            kinds = _kinds_of(recipe, parts)
            assert not self.kinds.keys() & set(recipe.made), recipe.made
            self.kinds |= dict(zip(recipe.made, kinds, strict=True))
            self._recipe_of |= dict.fromkeys(recipe.made, recipe)

    def __call__(self, name: str) -> Tensor:
        """The tensor ``name``. Those made with it are kept until they are asked for, or another recipe's turn comes."""
        if name not in self._made:
            self._made = {}  # freed before the next are read
            recipe = self._recipe_of[name]
            made = recipe.arrange([self._read(part) for part in recipe.parts])
            self._made = dict(zip(recipe.made, made, strict=True))
        return self._made.pop(name)


def _kinds_of(recipe: Recipe, parts: Mapping[str, TensorKind]) -> list[TensorKind]:
    try:
        made = recipe.arrange([parts[name].placeholder() for name in recipe.parts])
    except (
        IndexError,
        RuntimeError,
    ):  # torch: too few dimensions, or sizes that do not go together
        made = []
    if len(made) != len(recipe.made):  # a tensor that is too small to be cut into so many
        raise ValueError(_misshapen(recipe, parts))
    return [TensorKind.of(tensor) for tensor in made]


def _misshapen(recipe: Recipe, parts: Mapping[str, TensorKind]) -> str:
    """Names the part whose shape is not that of the others, or the only one."""
    shapes = Counter(parts[name].shape for name in recipe.parts)
    usual = shapes.most_common(1)[0][0]
    odd = next((name for name in recipe.parts if parts[name].shape != usual), recipe.parts[0])
    others = f" and the others of its kind {usual}" if len(shapes) > 1 else ""
    return f"{odd} has shape {parts[odd].shape}{others}, of which {recipe.made[0]} cannot be made"


CONFIG = "config.json"

# Below a checkpoint: what its released model has besides our tensors. It goes where the checkpoint goes, and back with an export.
SOURCE = "hugging_face"
LAYOUT = "layout.json"
LEFT_BEHIND = "left_behind.safetensors"
_LAYOUT_KIND = "layout of a released model"

# Tokenizers, processors, chat templates, terms of use; their code and other formats' weights stay behind.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_NAMES = ("LICENSE", "NOTICE")
_LARGEST = 64 * 2**20

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HuggingFaceModel:
    """The tensors of a released model under our names: a ``StoredModel``. ``args`` shape it; its latent parts are not in it, and
    what is ``left_behind`` on disk has no part here, see ``unused``.

    Raises:
        ValueError: an unknown architecture or a setting that we do not express, weights that are missing, damaged, quantised or of
            other shapes than config.json says, or tensors that no part of our model stands for and the backbone does not know.
    """

    step = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_table(folder / CONFIG)
        try:
            self.backbone: Backbone = backbone_of(self.config)
            self.args: ModelArgs = self.backbone.model_args(self.config)
            places = places_in(folder)
            self.layout = {name: place.kind.shape for name, place in places.items()}
            links = self.backbone.links(self.args, self.layout)
        except ValueError as error:
            where = str(folder)
            raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from None
        self.unused = PlacedTensors(
            {n: places.pop(n) for n in unused_names(self.backbone, self.args, places)}
        )
        self.left_behind = self.unused.tensors
        theirs = PlacedTensors(places)
        _check_theirs(folder, theirs.tensors, links)
        recipes = [Recipe(link.theirs, link.ours, link.load) for link in links]
        try:
            self._values = Arranged(recipes, theirs.tensors, theirs.read)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        self.tensors: Mapping[str, TensorKind] = self._values.kinds
        _check_ours(folder, self.tensors, self.args)

    def read(self, name: str) -> Tensor:
        return self._values(name)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        in_order = {name: tensors[name] for name in self.tensors if name in tensors}
        fill(in_order, self.read)


def unused_names(backbone: Backbone, args: ModelArgs, names: Collection[str]) -> list[str]:
    """Those of the names on disk that have no part in our model, as the backbone knows."""
    patterns = backbone.unused(args, names)
    return [name for name in names if any(re.match(p, name) for p in patterns)]


def _check_theirs(folder: Path, kinds: Mapping[str, TensorKind], links: list[Link]) -> None:
    used = dict.fromkeys(name for link in links for name in link.theirs)
    missing = [name for name in used if name not in kinds]
    if missing:
        raise ValueError(f"{folder} lacks {some_of(missing)}, which {CONFIG} asks for")
    more = [name for name in kinds if name not in used]
    if more:
        raise ValueError(
            f"{folder} holds {some_of(more)}, which no part of our model stands for; read without them it would be another model"
        )
    for name, kind in kinds.items():
        if kind.dtype not in _FLOATS:
            raise ValueError(
                f"{folder}: {name} is {str(kind.dtype).removeprefix('torch.')}, as in quantised models; use a release in "
                "bfloat16, float16 or float32"
            )


def _check_ours(folder: Path, kinds: Mapping[str, TensorKind], args: ModelArgs) -> None:
    with torch.device("meta"):
        expected = tensors_of_model(SymbioticModel(args))
    absent = absent_parts(kinds)
    for name, kind in expected.items():
        if part_of(name) in absent:
            continue
        assert name in kinds, f"no link of the backbone gives {name}"
        if kinds[name].shape != kind.shape:
            raise ValueError(
                f"{folder}: {name} has shape {kinds[name].shape} in its files, {kind.shape} by {CONFIG}"
            )
    assert kinds.keys() <= expected.keys(), "a link of the backbone gives what the model has not"


# ---- what belongs to a released model besides our tensors ---------------------------------------------------------------------


def keep_source(stored: StoredModel, out: Path) -> None:
    """Give the checkpoint in ``out`` what ``stored`` has besides our tensors, if it is, or came from, a released model."""
    if not isinstance(stored, HuggingFaceModel):
        if (stored.folder / SOURCE).is_dir():
            shutil.copytree(stored.folder / SOURCE, out / SOURCE)
        return
    (out / SOURCE).mkdir()
    for path in small_files(stored.folder):
        shutil.copyfile(path, out / SOURCE / path.name)
    shapes = {name: list(shape) for name, shape in stored.layout.items()}
    write_json(out / SOURCE / LAYOUT, _LAYOUT_KIND, {"shapes": shapes})
    if stored.left_behind:
        write_file(out / SOURCE / LEFT_BEHIND, stored.left_behind, stored.unused.read)


def source_bytes(stored: StoredModel) -> int:
    """How much ``keep_source`` writes, but for small files."""
    if isinstance(stored, HuggingFaceModel):
        return total_bytes(stored.left_behind.values())
    kept = stored.folder / SOURCE / LEFT_BEHIND
    return kept.stat().st_size if kept.is_file() else 0


def left_behind_of(stored: StoredModel, source: Path) -> PlacedTensors:
    """The tensors of the released model that have no part in ours: its own, or those that ``source``, the folder ``SOURCE`` of a
    checkpoint, keeps of it. A folder from before they were kept has none."""
    if isinstance(stored, HuggingFaceModel):
        return stored.unused
    kept = source / LEFT_BEHIND
    return PlacedTensors(read_places(kept) if kept.is_file() else {})


def small_files(folder: Path) -> list[Path]:
    """The files of a released model that are no weights."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _SUFFIXES or path.stem in _NAMES)
        and not path.name.endswith(".index.json")
        and path.name != LAYOUT
        and path.stat().st_size <= _LARGEST
    ]


def read_layout(source: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the released model's tensors by name; ``source`` is the folder ``SOURCE`` of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    shapes: dict[str, Any] = read_json(source / LAYOUT, _LAYOUT_KIND, ("shapes",))["shapes"]
    check_value(f"{_LAYOUT_KIND}: {source / LAYOUT}: shapes", shapes, dict[str, list[int]])
    return {name: tuple(shape) for name, shape in shapes.items()}


def open_model(folder: Path) -> StoredModel:
    """A distributed checkpoint, a released model, or safetensors under our names: what lies in the folder decides.

    Raises:
        ValueError: there is none of them, or it is damaged.
    """
    if not (folder / ".metadata").is_file():
        if has_weights(folder) and (folder / shape_file.NAME).is_file():
            return SafetensorsModel(folder)
        if has_weights(folder) or (folder / CONFIG).is_file():
            return HuggingFaceModel(folder)
    return DistributedCheckpoint(folder)
