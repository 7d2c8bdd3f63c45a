"""Tensors that are made of other tensors by the links of a backbone, a link at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from symbiotic_titan.backbones.backbone import Arrange
from symbiotic_titan.checkpoint.stored_model import TensorKind


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
