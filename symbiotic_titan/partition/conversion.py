"""Where each tensor of a partitioned model comes from: copied, sliced by experts, made of several experts, or new."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from symbiotic_titan.partition.pools import ONE_POOL
from symbiotic_titan.weights.compatibility import (
    SHARED,
    absent_parts,
    check_num_embeddings,
    part_of,
)
from symbiotic_titan.weights.reader import (
    TensorSpec,
    some_of,
)

_SHARED_TENSOR = re.compile(r"(layers\.\d+)\.moe\.shared_experts\.(w[123])\.weight")
_REMEDY = (
    "use the model.flavor and [latents] it was trained with; for a released model that flavor is the model.json that "
    "symbiotic convert from-hf --shape-only writes"
)
_EXPERT_TENSOR = re.compile(r"(layers\.\d+)\.moe\.(router|experts)\.(\w+)\.(weight|bias|w[123])")


Slots = Mapping[tuple[str, str], tuple[str, tuple[int, ...] | None]]
"""(layer, group) -> (pool of the original, indices of the experts taken from it; None: all, in their order)."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the new checkpoint comes from.

    name     of the old tensor; None for a new one.
    experts  which slices of the old tensor's first dimension (None: all of it).
    joined   the experts are concatenated along their hidden dimension, as one wide expert.
    zeros    a new tensor of zeros; other new ones get initial values.
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
        """Shape of the part taken from an old tensor of shape ``whole``."""
        if self.experts is None:
            return whole
        count = len(self.experts)
        return (count * whole[1], *whole[2:]) if self.joined else (count, *whole[1:])


@dataclass(frozen=True)
class Conversion:
    """How the tensors ``after`` of the new checkpoint are made from the tensors ``before`` of the old one.

    origins  name in ``after`` -> where that tensor comes from.
    dropped  names in ``before`` that are not used.
    """

    before: Mapping[str, TensorSpec]
    after: Mapping[str, TensorSpec]
    origins: Mapping[str, Origin]
    dropped: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Summary with all layers merged: kind, name with ``*`` for the layer number, number of tensors, number of parameters."""
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
        """Numbers of parameters: before, after, copied, sliced, new and dropped."""
        sizes = {
            "before": sum(tensor.num_values for tensor in self.before.values()),
            "after": sum(tensor.num_values for tensor in self.after.values()),
        }
        for kind in ("copied", "sliced", "new", "dropped"):
            sizes[kind] = sum(row["parameters"] for row in self.rows() if row["what"] == kind)
        return sizes


def plan_conversion(
    source: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
    slots: Slots,
    shared: Mapping[str, tuple[int, ...]],
) -> Conversion:
    """Where each tensor of ``target`` comes from.

    slots   empty where the groups stay as they are.
    shared  layer -> original experts that its new shared expert is made from.

    Raises:
        ValueError: ``source`` lacks a tensor, has one of another shape, or has one that the config's model does not use.
    """
    held, needs = ({name: spec.shape for name, spec in side.items()} for side in (source, target))
    check_num_embeddings("the checkpoint", held, needs)
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
    dtype = source["tok_embeddings.weight"].dtype  # of new tensors
    after = {
        name: TensorSpec(target[name].shape, source[origin.name].dtype if origin.name else dtype)
        for name, origin in origins.items()
    }
    return Conversion(source, after, origins, dropped)


def _shared_origin(name: str, shared: Mapping[str, tuple[int, ...]]) -> Origin | None:
    """The origin of a tensor of a new shared expert; None for any other. Its gate and up projections are those of the ``shared``
    experts. Its down projection is zero, so that it adds nothing before training; the gradient of those zeros is not zero."""
    match = _SHARED_TENSOR.fullmatch(name)
    if match is None or match[1] not in shared:
        return None
    layer, leaf = match.groups()
    if leaf == "w2":
        return Origin(None, zeros=True)
    return Origin(f"{layer}.moe.experts.{ONE_POOL}.{leaf}", shared[layer], joined=True)


def _origin(
    name: str,
    source: Mapping[str, TensorSpec],
    slots: Slots,
) -> Origin:
    match = _EXPERT_TENSOR.fullmatch(name)
    if match and slots:
        layer, part, group, leaf = match.groups()
        pool, experts = slots[layer, group]
        old = f"{layer}.moe.{part}.{pool}.{leaf}"
        return Origin(old, experts) if old in source else Origin(None)
    return Origin(name if name in source else None)


def _in_reading_order(
    origins: dict[str, Origin], source: Mapping[str, TensorSpec]
) -> dict[str, Origin]:
    """``origins`` in the order of ``source``, so that one read of an old tensor serves all its slices. New tensors come last."""
    index: dict[str | None, int] = {name: i for i, name in enumerate(source)}
    return dict(sorted(origins.items(), key=lambda item: index.get(item[1].name, len(index))))


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
    source: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
) -> None:
    assert origin.name is not None
    needs = target[name].shape
    if origin.shape(source[origin.name].shape) != needs:
        raise ValueError(
            f"the checkpoint is of another model: {origin.name} has shape {source[origin.name].shape}, from which "
            f"{name} of shape {needs} cannot be made; {_REMEDY}"
        )


# ---- as text -----------------------------------------------------------------------------------------------------------------


def conversion_table(conversion: Conversion) -> str:
    """Copied tensors by part of the model, others by name; then the number of parameters before and after."""
    lines: dict[tuple[str, str], list[int]] = {}
    for row in conversion.rows():
        copied = row["what"] == "copied"
        name = part_of(row["tensor"]) + ".*" if copied else row["tensor"]
        line = lines.setdefault((row["what"], name), [0, 0])
        line[0] += row["tensors"]
        line[1] += row["parameters"]
    totals = conversion.totals()
    return (
        _table(dict(sorted(lines.items(), key=lambda line: line[0][0])))
        + f"\n\nparameters: {totals['before']:,} before, {totals['after']:,} after "
        f"(copied {totals['copied']:,}, sliced {totals['sliced']:,}, new {totals['new']:,}, dropped {totals['dropped']:,})"
    )


def parts_table(specs: Mapping[str, TensorSpec]) -> str:
    """Number of tensors and parameters in each part of a model."""
    lines: dict[tuple[str, str], list[int]] = {}
    for name, spec in specs.items():
        line = lines.setdefault(("", part_of(name) + ".*"), [0, 0])
        line[0] += 1
        line[1] += spec.num_values
    return _table(lines)


def _table(lines: Mapping[tuple[str, str], list[int]]) -> str:
    """(kind, name) -> tensors, parameters."""
    first, second = (max(len(key[i]) for key in lines) for i in (0, 1))
    return "\n".join(
        f"  {what:{first + bool(first)}s}{name:{second}s}  x {tensors:<5d}{parameters:>16,}"
        for (what, name), (tensors, parameters) in lines.items()
    )
