"""What a parallel layout costs one rank: shapes of shards, memory, bytes sent. Arithmetic on shapes; nothing is computed or sent.

``sharded_parameters`` reads the model that ``parallelize`` made, which may be on the meta device; all other functions work on its
result. Bytes "sent" leave a rank in the usual ring or pairwise algorithms; "gathered" is what FSDP holds on each rank while a unit
computes. In formulas n is the number of ranks of an axis, W the bytes of the gathered weights.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig

from symbiotic_titan.config.optimizer import clean_name

# (pattern over clean names, kind of parameter): the first match decides.
_KINDS = (
    (r"^vit\.", "vit"),
    (r"^(latent_embedding|flow_head)\.", "latent and flow"),
    (r"^tok_embeddings\.", "embeddings"),
    (r"^output\.", "output"),
    (r"\.moe\.router\.", "router"),
    (r"\.moe\.experts\.(\w+)\.", r"experts \1"),
    (r"\.moe\.shared_experts\.", "shared experts"),
    (r"\.feed_forward\.", "dense ffn"),
    (r"norm\.", "norms"),
    (r"\.attention\.", "attention"),
)


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter and how it is sharded.

    name, unit:   clean names of the parameter and of the FSDP unit it belongs to ("" is the root).
    shape, local: the full shape, and that of this rank's shard.
    gathered:     elements on every rank while its unit computes, FSDP's padding included.
    shard, replicate, expert: ranks of the axis over which FSDP shards it, of HSDP's replicas, of expert parallelism.
    """

    name: str
    unit: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    gathered: int
    shard: int
    replicate: int
    expert: int
    trainable: bool

    @property
    def kind(self) -> str:
        for pattern, kind in _KINDS:
            found = re.search(pattern, self.name)
            if found:
                return found.expand(kind)
        raise AssertionError(f"no kind for the parameter {self.name}")


def sharded_parameters(model: nn.Module) -> list[ShardedParameter]:
    """The parameters of a model, parallel or not, in the model's order."""
    units = [clean_name(name) for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    found = []
    for name, parameter in model.named_parameters():
        name = clean_name(name)
        inside = [unit for unit in units if not unit or name.startswith(f"{unit}.")]
        found.append(_sharded_parameter(name, max(inside, key=len, default=""), parameter))
    return found


def _sharded_parameter(name: str, unit: str, parameter: nn.Parameter) -> ShardedParameter:
    shape = local = tuple(parameter.shape)
    gathered, axes = list(shape), dict[str, int]()
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        assert mesh.mesh_dim_names is not None
        axes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        local = tuple(parameter.to_local().shape)
        # Only experts have this axis. It shards dim 0, and FSDP gathers this rank's share of it.
        gathered[0] //= axes.get("ep", 1)
        for axis, placement in zip(mesh.mesh_dim_names, parameter.placements, strict=True):
            if axis in ("fsdp", "efsdp"):
                dim = placement.dim  # type: ignore[attr-defined]  # Shard or _StridedShard
                # FSDP pads the sharded dim to a multiple of the ranks.
                gathered[dim] = -(-gathered[dim] // axes[axis]) * axes[axis]
    return ShardedParameter(
        name=name,
        unit=unit,
        shape=shape,
        local=local,
        gathered=prod(gathered),
        shard=axes.get("fsdp", axes.get("efsdp", 1)),
        replicate=axes.get("dp_replicate", 1),
        expert=axes.get("ep", 1),
        trainable=parameter.requires_grad,
    )


@dataclass(frozen=True)
class Precision:
    """Bytes per element: stored (weights, gradients, Adam), in computation, and where gradients are summed. Routers compute and sum in
    float32 whatever the others do, see ``fsdp``."""

    stored: int
    computed: int
    reduced: int

    def computed_of(self, parameter: ShardedParameter) -> int:
        return torch.float32.itemsize if parameter.kind == "router" else self.computed

    def reduced_of(self, parameter: ShardedParameter) -> int:
        return torch.float32.itemsize if parameter.kind == "router" else self.reduced

    @classmethod
    def of(cls, config: JobConfig) -> "Precision":
        training = config.training
        names = (training.dtype, training.mixed_precision_param, training.mixed_precision_reduce)
        return cls(
            *(torch.empty((), dtype=TORCH_DTYPE_MAP[n], device="meta").itemsize for n in names)
        )


# ---- memory -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank that persist from step to step."""

    parameters: int
    gradients: int
    adam: int
    ema: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.adam + self.ema


def state_memory(
    parameters: Iterable[ShardedParameter],
    precision: Precision,
    averaged: Collection[str] = (),
) -> StateMemory:
    """Weights, sharded gradients and Adam's two moments, all in the dtype of the stored weights; and the float32 average of the
    parameters ``averaged``, see [ema]."""
    parameters = list(parameters)
    weights = precision.stored * sum(prod(p.local) for p in parameters)
    trained = precision.stored * sum(prod(p.local) for p in parameters if p.trainable)
    average = 4 * sum(prod(p.local) for p in parameters if p.name in averaged)
    return StateMemory(weights, trained, 2 * trained, average)


def units_of(parameters: Iterable[ShardedParameter]) -> dict[str, list[ShardedParameter]]:
    """FSDP unit -> its parameters."""
    units: dict[str, list[ShardedParameter]] = {}
    for parameter in parameters:
        units.setdefault(parameter.unit, []).append(parameter)
    return units


def stage_of(unit: str) -> str:
    """The decoder or ViT block that a unit is gathered with; the unit itself outside of blocks."""
    found = re.match(r"(vit\.)?layers\.\d+", unit)
    return found[0] if found else unit


@dataclass(frozen=True)
class GatheredMemory:
    """Bytes of gathered weights on one rank.

    unit, unit_weights: the largest FSDP unit and its weights, in the dtype of the computation.
    unit_gradients:     the buffer in which its gradients are summed.
    peak:               the root and the largest two neighbouring blocks, because the next block is prefetched; all weights with
                        ``fsdp_reshard_after_forward = "never"``.
    """

    unit: str
    unit_weights: int
    unit_gradients: int
    peak: int


def gathered_memory(
    parameters: Sequence[ShardedParameter], precision: Precision, reshard: str
) -> GatheredMemory:
    """Memory for weights on top of ``state_memory`` while a step runs. On one rank, without FSDP, these are the copies that autocast
    makes of all weights but the routers' and caches for the backward."""
    members = units_of(parameters)
    units = {
        unit: sum(p.gathered * precision.computed_of(p) for p in inside)
        for unit, inside in members.items()
    }
    # Without FSDP autocast copies every weight in its first matmul, and the backward needs the copies.
    if all(p.shard == p.expert == 1 for p in parameters):
        copied = [p for p in parameters if precision.computed_of(p) != precision.stored]
        copies = sum(p.gathered * precision.computed_of(p) for p in copied)
        return GatheredMemory("none", 0, 0, copies)
    largest = max(units, key=lambda unit: units[unit])
    stages: dict[str, int] = {}
    for unit, size in units.items():
        if unit:
            stages[stage_of(unit)] = stages.get(stage_of(unit), 0) + size
    # Neighbours in order of execution, which is not the order of parameters: token embeddings run just before the decoder.
    order = sorted(stages, key=lambda stage: (stage.startswith("layers."), stage[:3] == "tok"))
    sizes = [0, *(stages[stage] for stage in order), 0]
    neighbours = max(sum(pair) for pair in pairwise(sizes))
    peak = sum(sizes) if reshard == "never" else neighbours
    return GatheredMemory(
        unit=largest or "root",
        unit_weights=units[largest],
        unit_gradients=sum(p.gathered * precision.reduced_of(p) for p in members[largest]),
        peak=peak + units.get("", 0),
    )


def unsharded_gradients(parameters: Iterable[ShardedParameter], precision: Precision) -> int:
    """Bytes of the gradients that a rank holds between micro-batches with ``fsdp_gradient_sync = "last"``."""
    return sum(p.gathered * precision.reduced_of(p) for p in parameters if p.trainable)


# ---- communication ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave one rank.

    gather_*:       FSDP's all-gathers of weights.
    reduce_scatter: FSDP's sums of gradients.
    all_reduce:     HSDP's sums over replicas.
    exchange_*:     the expert-parallel all-to-alls, out and back; ``backward`` includes what activation checkpointing sends again when
                    it recomputes the forward.
    context_*:      context parallelism's gathers of keys and values; ``backward``: the sums of their gradients, and the gathers that
                    activation checkpointing repeats.
    """

    gather_forward: int = 0
    gather_backward: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0
    exchange_forward: int = 0
    exchange_backward: int = 0
    context_forward: int = 0
    context_backward: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * getattr(self, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def of_step(self, micro_batches: int, gradient_sync: str) -> "Traffic":
        """Of a step whose micro-batches each have this traffic, except that replicas, and with ``last`` all ranks, reduce once."""
        scatters = micro_batches if gradient_sync == "always" else 1
        return replace(
            self * micro_batches,
            reduce_scatter=self.reduce_scatter * scatters,
            all_reduce=self.all_reduce,
        )

    @property
    def forward(self) -> "Traffic":
        """The traffic of a forward without gradients."""
        return Traffic(
            gather_forward=self.gather_forward,
            exchange_forward=self.exchange_forward,
            context_forward=self.context_forward,
        )


def weight_traffic(
    parameters: Iterable[ShardedParameter], precision: Precision, gathers_again: int
) -> Traffic:
    """One forward and backward of FSDP units: an all-gather of W bytes sends (n - 1) / n * W, a reduce-scatter the same in its own
    dtype, the all-reduce over replicas 2 (n - 1) / n of a shard. ``gathers_again``: how often the backward gathers the weights."""
    gather = scatter = replicas = 0
    for p in parameters:
        leaving = p.gathered * (p.shard - 1) // p.shard
        gather += leaving * precision.computed_of(p)
        if p.trainable:  # frozen weights are gathered too, but have no gradient to reduce
            reduced = precision.reduced_of(p)
            scatter += leaving * reduced
            replicas += 2 * (p.gathered // p.shard) * (p.replicate - 1) // p.replicate * reduced
    return Traffic(
        gather_forward=gather,
        gather_backward=gather * gathers_again,
        reduce_scatter=scatter,
        all_reduce=replicas,
    )


def gathers_in_backward(stage: str, last_block: str, reshard: str) -> int:
    """How often the backward gathers a stage; ``reshard`` is ``parallelism.fsdp_reshard_after_forward``. By default the root and the
    last block stay gathered; with ``always`` the last block is gathered once too often, see ``fsdp.gather_ahead``."""
    if reshard == "never" or stage == "tok_embeddings":
        return 0
    if reshard == "default":
        return int(stage not in ("", last_block))
    return 1 + (stage == last_block)


def exchange_traffic(
    num_copies: int, dim: int, degree: int, precision: Precision, *, recomputed: bool
) -> Traffic:
    """One MoE layer: ``num_copies`` (T * K) rows of width D go out and come back, in the forward and as gradients.

    Assumes even routing, so that a share of (n - 1) / n leaves the rank; ignores the token counts, 8 bytes per expert.
    ``recomputed``: the forward's two exchanges run again in the backward.
    """
    one_way = num_copies * dim * precision.computed * (degree - 1) // degree
    return Traffic(
        exchange_forward=2 * one_way, exchange_backward=2 * one_way * (2 if recomputed else 1)
    )


def context_traffic(
    num_tokens: int, kv_channels: int, degree: int, precision: Precision, *, recomputed: bool
) -> Traffic:
    """One attention layer: the keys and values, uC channels each, of the ``num_tokens`` that ``degree`` ranks share are gathered, and
    their gradients are reduced and scattered. ``recomputed``: the gather runs again in the backward."""
    one_way = 2 * num_tokens * kv_channels * precision.computed * (degree - 1) // degree
    return Traffic(context_forward=one_way, context_backward=one_way * (2 if recomputed else 1))


def traffic_by_stage(
    parameters: Sequence[ShardedParameter],
    precision: Precision,
    reshard: str,
    of_tokens: Mapping[str, Traffic] = MappingProxyType({}),
) -> dict[str, Traffic]:
    """Stage (a block, or a unit outside of blocks; "" is the root) -> traffic of one forward and backward. ``of_tokens``: what
    stages send besides weights and their gradients."""
    stages: dict[str, list[ShardedParameter]] = {}
    for parameter in parameters:
        stages.setdefault(stage_of(parameter.unit), []).append(parameter)
    last_block = [stage for stage in stages if stage.startswith("layers.")][-1:]
    traffic = {}
    for stage, members in stages.items():
        again = gathers_in_backward(stage, "".join(last_block), reshard)
        traffic[stage] = weight_traffic(members, precision, again)
        traffic[stage] += of_tokens.get(stage, Traffic())
    return traffic


# ---- summaries --------------------------------------------------------------------------------------------------------------


def pattern_of(name: str) -> str:
    """``name`` with ``*`` for layer numbers; ``root`` for the empty name."""
    return re.sub(r"\blayers\.\d+", "layers.*", name) or "root"


def shape_rows(parameters: Iterable[ShardedParameter]) -> list[dict[str, Any]]:
    """One table row per kind, name pattern and shape: full shape, this rank's shard, and how many parameters have them."""
    counts = Counter((p.kind, pattern_of(p.name), p.shape, p.local) for p in parameters)
    columns = ("kind", "parameter", "shape", "local", "count")
    return [dict(zip(columns, (*row, count), strict=True)) for row, count in counts.items()]


def traffic_rows(stages: Mapping[str, Traffic]) -> list[dict[str, Any]]:
    """One table row per run of blocks with equal traffic, and how many blocks it has."""
    groups: dict[tuple[str, Traffic], list[str]] = {}
    for stage, traffic in stages.items():
        groups.setdefault((pattern_of(stage), traffic), []).append(stage or "root")
    return [
        {
            "stage": names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
            "count": len(names),
            **asdict(traffic),
        }
        for (_, traffic), names in groups.items()
    ]
