"""Tensors that are made of other tensors by the links of a backbone, a link at a time."""

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
            twice = self.kinds.keys() & set(recipe.made)
            assert len(kinds) == len(recipe.made) and not twice, recipe.made
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
    placeholders = [parts[name].placeholder() for name in recipe.parts]
    try:
        return [TensorKind.of(tensor) for tensor in recipe.arrange(placeholders)]
    except RuntimeError as error:  # torch: sizes that do not go together
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in placeholders[:3])
        raise ValueError(
            f"{recipe.made[0]} cannot be made of {recipe.parts[0]} and its like, of shape {shapes}: {error}"
        ) from None
