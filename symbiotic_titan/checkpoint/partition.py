"""A checkpoint whose experts are one pool -> the same model with its experts in groups, tensor by tensor.

An expert keeps its weights and its row of the router (and its selection bias), so a token whose top-k lies in its group gets what
it got before (arXiv 2604.07753, "knowledge-inherited initialisation"). Peak memory is two to three of the largest tensors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.checkpoint.json_file import read_json, write_json
from symbiotic_titan.checkpoint.plan import Plan
from symbiotic_titan.checkpoint.profile import router_groups, router_hash
from symbiotic_titan.checkpoint.tensor_store import (
    StoredModel,
    TensorKind,
    check_target,
    write_model,
)
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.initialize import initialize
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup

KIND = "partitioned checkpoint"
RECORD = "conversion.json"

# Parts of the model that a checkpoint may lack: they get their initial values.
NEW_PARTS = ("latent_embedding", "flow_head")

_EXPERT_TENSOR = re.compile(r"(layers\.\d+)\.moe\.(router|experts)\.(\w+)\.(weight|bias|w[123])")
_SHARED = ".moe.shared_experts."


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the new checkpoint comes from: ``name`` of the old one, and which of its experts (None: all of it).
    Without a name it is new."""

    name: str | None
    experts: tuple[int, ...] | None = None

    @property
    def kind(self) -> str:
        if self.name is None:
            return "new"
        return "copied" if self.experts is None else "sliced"


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


def tensors_of_model(model: SymbioticModel) -> dict[str, TensorKind]:
    """What a checkpoint of ``model`` holds."""
    return {
        name: TensorKind(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def check_is_model(stored: StoredModel, tensors: Mapping[str, TensorKind]) -> None:
    """Pass if the checkpoint holds ``tensors``, but for those of ``NEW_PARTS``, and nothing else but shared experts, which
    experts.shared = false leaves aside.

    Raises:
        ValueError: names a tensor that differs, and the groups where the partition does.
    """
    has, needs = sorted(router_groups(stored.tensors)), sorted(router_groups(tensors))
    if has != needs:
        raise ValueError(
            f"checkpoint {stored.folder} has the expert groups {', '.join(has)}, the config's model {', '.join(needs)}; "
            "use the config that the checkpoint was made for"
        )
    where = f"checkpoint {stored.folder} is of another model"
    remedy = "use the model.flavor, [experts] and [latents] it was saved with"
    for name, kind in tensors.items():
        if name not in stored.tensors and not _may_be_new(name):
            raise ValueError(f"{where}: it lacks {name}; {remedy}")
        if name in stored.tensors and stored.tensors[name].shape != kind.shape:
            raise ValueError(
                f"{where}: {name} has shape {stored.tensors[name].shape} in it and {kind.shape} here; {remedy}"
            )
    more = [name for name in stored.tensors if name not in tensors and _SHARED not in name]
    if more:
        raise ValueError(
            f"{where}: it holds {_some(more)}, which the config's model has not; {remedy}"
        )


def plan_conversion(
    source: Mapping[str, TensorKind],
    target: Mapping[str, TensorKind],
    slots: Mapping[tuple[str, str], tuple[int, ...]],
) -> Conversion:
    """Where each tensor of ``target`` comes from. ``slots``: (layer, group) -> original experts; empty where experts stay one pool.

    Raises:
        ValueError: ``source`` lacks a tensor, has another shape than the config's model, or holds what that model has no use for.
    """
    origins = _neighbours({name: _origin(name, source, slots) for name in target})
    missing = [n for n, origin in origins.items() if origin.name is None and not _may_be_new(n)]
    _check_missing(missing)
    for name, origin in origins.items():
        if origin.name is not None:
            _check_shape(name, origin, source, target)
    used = {origin.name for origin in origins.values()}
    dropped = tuple(name for name in source if name not in used)
    foreign = [name for name in dropped if _SHARED not in name]
    if foreign:
        raise ValueError(
            f"the checkpoint is of another model: the config's model has no {_some(foreign)}; "
            "use the model.flavor and [latents] it was trained with"
        )
    dtype = source["tok_embeddings.weight"].dtype  # of what is new
    after = {
        name: TensorKind(target[name].shape, source[origin.name].dtype if origin.name else dtype)
        for name, origin in origins.items()
    }
    return Conversion(source, after, origins, dropped)


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


def _neighbours(origins: dict[str, Origin]) -> dict[str, Origin]:
    """The same, with what comes from one tensor side by side: it is then read once."""
    first: dict[str | None, int] = {}
    for origin in origins.values():
        first.setdefault(origin.name, len(first))
    return dict(sorted(origins.items(), key=lambda item: first[item[1].name]))


def _may_be_new(name: str) -> bool:
    return name.startswith(tuple(f"{part}." for part in NEW_PARTS))


def _some(names: Iterable[str]) -> str:
    """At most three of the names."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_missing(missing: list[str]) -> None:
    if missing and all(_SHARED in name for name in missing):
        raise ValueError(
            f"the checkpoint has no shared expert ({_some(missing)}); set experts.shared = false"
        )
    if missing:
        raise ValueError(
            f"the checkpoint is of another model: it lacks {_some(missing)}; use the model.flavor it was trained with"
        )


def _check_shape(
    name: str,
    origin: Origin,
    source: Mapping[str, TensorKind],
    target: Mapping[str, TensorKind],
) -> None:
    assert origin.name is not None
    has, needs = source[origin.name].shape, target[name].shape
    if origin.experts is not None:
        has = (len(origin.experts), *has[1:])
    if has != needs:
        raise ValueError(
            f"the checkpoint is of another model: {origin.name} has shape {source[origin.name].shape}, from which "
            f"{name} of shape {needs} cannot be made; use the model.flavor and [latents] it was trained with"
        )


def expert_slots(
    plan: Plan | None, groups: tuple[ExpertGroup, ...]
) -> dict[tuple[str, str], tuple[int, ...]]:
    """(layer, group) -> original experts; empty for one pool.

    Raises:
        ValueError: the plan is missing, not needed, or of other groups.
    """
    if [group.name for group in groups] == ["all"]:
        if plan is not None:
            raise ValueError(
                "--plan has no effect: the config has no [experts.partition]; leave it out or use another config"
            )
        return {}
    if plan is None:
        raise ValueError(
            "the config partitions the experts: --plan must say which expert goes where (tools/convert.py plan makes one)"
        )
    if plan.groups != groups:
        raise ValueError(
            f"the plan is of other groups than the config: it has {_describe(plan.groups)}, "
            f"[experts.partition] has {_describe(groups)}; make a plan with this config"
        )
    sizes = [group.num_experts for group in groups]
    return {
        (layer, group.name): tuple(experts.tolist())
        for layer, row in zip(plan.layers, plan.order, strict=True)
        for group, experts in zip(groups, row.split(sizes), strict=True)
    }


def _describe(groups: tuple[ExpertGroup, ...]) -> str:
    return " + ".join(f"{group.name} {group.num_experts}" for group in groups)


def _check_source(stored: StoredModel, plan: Plan | None) -> None:
    groups = router_groups(stored.tensors)
    if groups - {"all"}:
        raise ValueError(
            f"checkpoint {stored.folder} is already partitioned into {', '.join(sorted(groups))}; "
            "start from the checkpoint before that"
        )
    if plan is not None and plan.model.routers != router_hash(stored):
        raise ValueError(
            f"the plan is of another model: its routers have hash {plan.model.routers} (flavor {plan.model.flavor}, step "
            f"{plan.model.step}), those of {stored.folder} {router_hash(stored)}; profile this checkpoint"
        )


def partition_checkpoint(
    source: Path, args: ModelArgs, plan: Plan | None, out: Path, *, overwrite: bool = False
) -> Conversion:
    """Write the model that ``args`` shape, made from the checkpoint ``source``, as a checkpoint of the model alone.

    Without groups it extracts the model (without its shared expert, where ``args`` have none).

    Raises:
        ValueError: ``source`` cannot become this model, the plan does not fit, or ``out`` exists.
    """
    check_target(out, overwrite=overwrite)
    stored = StoredModel(source)
    slots = expert_slots(plan, args.groups)
    _check_source(stored, plan)
    with torch.device("meta"):
        model = SymbioticModel(args)
    conversion = plan_conversion(stored.tensors, tensors_of_model(model), slots)
    values = _Values(stored, conversion, _initial_values(model, args, conversion))

    def finish(folder: Path) -> None:
        record = {
            "source": str(source),
            "step": stored.step,
            "plan": None if plan is None else plan.values(),
            "parameters": conversion.totals(),
            "tensors": conversion.rows(),
        }
        write_json(folder / RECORD, KIND, record)

    write_model(out, conversion.after, values, finish, overwrite=overwrite)
    return conversion


def plan_of_checkpoint(folder: Path) -> Plan | None:
    """The plan that a checkpoint was partitioned by; None where experts are one pool or nobody wrote down how they were split."""
    if not (folder / RECORD).is_file():
        return None
    plan = read_json(folder / RECORD, KIND, ("plan",))["plan"]
    return None if plan is None else Plan.of_values(plan, str(folder / RECORD))


def _initial_values(
    model: SymbioticModel, args: ModelArgs, conversion: Conversion
) -> dict[str, Tensor]:
    """The new tensors; the rest of ``model`` stays on the meta device."""
    new = {name for name, origin in conversion.origins.items() if origin.name is None}
    if not new:
        return {}
    for part in NEW_PARTS:
        model.get_submodule(part).to_empty(device="cpu")
    initialize(model, seed=args.init_seed, only=new)
    return {name: model.get_parameter(name).detach() for name in new}


class _Values:
    """The values of each tensor of the new checkpoint. An old one is kept until another is asked for: its slices are neighbours."""

    def __init__(
        self, stored: StoredModel, conversion: Conversion, initial: Mapping[str, Tensor]
    ) -> None:
        self._stored = stored
        self._conversion = conversion
        self._initial = initial
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        origin = self._conversion.origins[name]
        if origin.name is None:
            return self._initial[name].to(self._conversion.after[name].dtype)
        if origin.experts is None:
            return self._stored.read(origin.name)
        if self._last is None or self._last[0] != origin.name:
            self._last = None  # freed before the next is read
            self._last = (origin.name, self._stored.read(origin.name))
        return self._last[1][list(origin.experts)]
