"""A released architecture as data: its config.json as ModelArgs, and which of its tensors are which of ours.

There is no model class per architecture: one decoder and one image encoder with switches express them all.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from symbiotic_titan.model.args import ModelArgs

Config = Mapping[str, Any]
Arrange = Callable[[list[Tensor]], list[Tensor]]
Shape = tuple[int, ...]


def as_they_are(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


def nothing(args: ModelArgs, names: Container[str]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Link:
    """Some tensors on disk and the same values as some of ours. ``load`` arranges theirs as ours and ``save`` ours as theirs, bit
    for bit, each in the order of the names."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Arrange = as_they_are
    save: Arrange = as_they_are


@dataclass(frozen=True)
class Backbone:
    """What there is to know about one ``model_type``.

    model_args  config.json -> the shape of the network, one pool of experts, latent parts as a flavor has them. Raises ValueError
                that names a setting which the network cannot express.
    links       (args, shapes of the tensors on disk by name) -> every tensor of the model but the latent parts, once. The
                shapes tell layouts apart that share a name.
    config      (config.json it came from, args) -> config.json of the model that ``args`` shape, e.g. with fewer experts.
    unused      (args, names on disk) -> patterns that those of the names begin with which have no part here and stay behind.
    """

    model_type: str
    model_args: Callable[[Config], ModelArgs]
    links: Callable[[ModelArgs, Mapping[str, Shape]], list[Link]]
    config: Callable[[Config, ModelArgs], dict[str, Any]]
    unused: Callable[[ModelArgs, Container[str]], tuple[str, ...]] = nothing
