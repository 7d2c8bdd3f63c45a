"""What becomes of every tensor when a stored model becomes the model that a config shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from symbiotic_titan.weights.compatibility import (
    SHARED,
    absent_parts,
    part_of,
)
from symbiotic_titan.weights.reader import (
    TensorKind,
    some_of,
)

_SHARED_TENSOR = re.compile(r"(layers\.\d+)\.moe\.shared_experts\.(w[123])\.weight")
_REMEDY = (
    "use the model.flavor and [latents] it was trained with; for a released model that flavor is the model.json that "
    "symbiotic convert from-hf --shape-only writes"
)
_EXPERT_TENSOR = re.compile(r"(layers\.\d+)\.moe\.(router|experts)\.(\w+)\.(weight|bias|w[123])")


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the new checkpoint comes from: ``name`` of the old one, and which of its experts (None: all of it).
    Without a name it is new.

    ``joined``: the experts side by side as one. ``zeros``: new, and zero.
    """

    name: str | None
    experts: tuple[int, ...] | None = None
    joined: bool = False
    zeros: bool = False

    @property
    def kind(self) -> str:
        if self.name is None:
            return "new"
        return "copied" if self.experts is None or self.joined else "sliced"

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """What is taken of an old tensor of shape ``whole``."""
        if self.experts is None:
            return whole
        count = len(self.experts)
        return (count * whole[1], *whole[2:]) if self.joined else (count, *whole[1:])


@dataclass(frozen=True)
class Conversion:
    """What becomes of every tensor. ``origins``: by name in the new checkpoint; ``dropped``: names of the old one."""

    before: Mapping[str, TensorKind]
    after: Mapping[str, TensorKind]
    origins: Mapping[str, Origin]
    dropped: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """What happened, layers taken together: kind, name with ``*`` for the layer, tensors, parameters."""
        rows: dict[tuple[str, str], list[int]] = {}
        named = [(origin.kind, name, self.after[name]) for name, origin in self.origins.items()]
        named += [("dropped", name, self.before[name]) for name in self.dropped]
        for kind, name, tensor in named:
            row = rows.setdefault((kind, re.sub(r"\blayers\.\d+\.", "layers.*.", name)), [0, 0])
            row[0] += 1
            row[1] += tensor.num_values
        return [
            {"what": kind, "tensor": name, "tensors": count, "parameters": size}
            for (kind, name), (count, size) in rows.items()
        ]

    def totals(self) -> dict[str, int]:
        """Parameters before and after, and of what was copied, sliced, new and dropped."""
        sizes = {
            "before": sum(tensor.num_values for tensor in self.before.values()),
            "after": sum(tensor.num_values for tensor in self.after.values()),
        }
        for kind in ("copied", "sliced", "new", "dropped"):
            sizes[kind] = sum(row["parameters"] for row in self.rows() if row["what"] == kind)
        return sizes


def plan_conversion(
    source: Mapping[str, TensorKind],
    target: Mapping[str, TensorKind],
    slots: Mapping[tuple[str, str], tuple[int, ...]],
    shared: Mapping[str, tuple[int, ...]],
) -> Conversion:
    """Where each tensor of ``target`` comes from. ``slots``: (layer, group) -> original experts; empty where experts stay one pool.
    ``shared``: layer -> original experts of which a shared one is made.

    Raises:
        ValueError: ``source`` lacks a tensor, has another shape than the config's model, or holds what that model has no use for.
    """
    origins = {n: _shared_origin(n, shared) or _origin(n, source, slots) for n in target}
    origins = _in_reading_order(origins, source)
    absent = absent_parts(source)
    new = [name for name, o in origins.items() if o.name is None and not o.zeros]
    missing = [name for name in new if part_of(name) not in absent]
    _check_missing(missing)
    for name, origin in origins.items():
        if origin.name is not None:
            _check_shape(name, origin, source, target)
    used = {origin.name for origin in origins.values()}
    dropped = tuple(name for name in source if name not in used)
    foreign = [name for name in dropped if SHARED not in name]
    if foreign:
        raise ValueError(
            f"the checkpoint is of another model: the config's model has no {some_of(foreign)}; {_REMEDY}"
        )
    dtype = source["tok_embeddings.weight"].dtype  # of what is new
    after = {
        name: TensorKind(target[name].shape, source[origin.name].dtype if origin.name else dtype)
        for name, origin in origins.items()
    }
    return Conversion(source, after, origins, dropped)


def _shared_origin(name: str, shared: Mapping[str, tuple[int, ...]]) -> Origin | None:
    """Of a tensor of a shared expert that is made: the inner halves of ``shared`` experts, and zeros on the way out, so that it
    adds nothing before it is trained; the gradient of those zeros is not zero."""
    match = _SHARED_TENSOR.fullmatch(name)
    if match is None or match[1] not in shared:
        return None  # not of a shared expert, or of one that is not made
    layer, leaf = match.groups()
    if leaf == "w2":
        return Origin(None, zeros=True)
    return Origin(f"{layer}.moe.experts.all.{leaf}", shared[layer], joined=True)


def _origin(
    name: str,
    source: Mapping[str, TensorKind],
    slots: Mapping[tuple[str, str], tuple[int, ...]],
) -> Origin:
    match = _EXPERT_TENSOR.fullmatch(name)
    if match and slots:
        layer, part, group, leaf = match.groups()
        old = f"{layer}.moe.{part}.all.{leaf}"
        return Origin(old, slots[layer, group]) if old in source else Origin(None)
    return Origin(name if name in source else None)


def _in_reading_order(
    origins: dict[str, Origin], source: Mapping[str, TensorKind]
) -> dict[str, Origin]:
    """The same in the order of ``source``: what comes from one tensor is then read once. What is new comes last."""
    place: dict[str | None, int] = {name: i for i, name in enumerate(source)}
    return dict(sorted(origins.items(), key=lambda item: place.get(item[1].name, len(place))))


def _check_missing(missing: list[str]) -> None:
    if missing and all(SHARED in name for name in missing):
        raise ValueError(
            f"the checkpoint has no shared expert ({some_of(missing)}); set experts.shared = false, or make the plan with "
            "experts.new_shared_experts"
        )
    if missing:
        raise ValueError(
            f"the checkpoint is of another model: it lacks {some_of(missing)}; {_REMEDY}"
        )


def _check_shape(
    name: str,
    origin: Origin,
    source: Mapping[str, TensorKind],
    target: Mapping[str, TensorKind],
) -> None:
    assert origin.name is not None
    needs = target[name].shape
    if origin.shape(source[origin.name].shape) != needs:
        raise ValueError(
            f"the checkpoint is of another model: {origin.name} has shape {source[origin.name].shape}, from which "
            f"{name} of shape {needs} cannot be made; {_REMEDY}"
        )
