"""Pools: the expert groups that a checkpoint has before it is converted, and what the groups of the new model take from them.

Most checkpoints have one pool, ``all``, which the groups divide. One that is released partitioned has several: then the keys ``source``
and ``copy`` of [experts.partition.<name>] say which group takes which experts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from symbiotic_titan.config.experts import ExpertGroupRow
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.weights.reader import TensorSpec

ONE_POOL = "all"

_ROUTER = re.compile(r"layers\.\d+\.moe\.router\.(\w+)\.weight")
_EXPERTS = re.compile(r"layers\.\d+\.moe\.experts\.(\w+)\.w1")


@dataclass(frozen=True)
class GroupSource:
    """Where the experts of a group come from.

    pool  name of the checkpoint's group.
    copy  the group takes all of its experts, beside the groups that divide them.
    """

    pool: str = ONE_POOL
    copy: bool = False


def pool_sizes(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Pool -> number of experts."""
    return {m[1]: t.shape[0] for name, t in tensors.items() if (m := _ROUTER.fullmatch(name))}


def pool_widths(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Pool -> width of its experts."""
    return {m[1]: t.shape[1] for name, t in tensors.items() if (m := _EXPERTS.fullmatch(name))}


def pool_columns(pools: Mapping[str, int]) -> dict[str, slice]:
    """Pool -> its experts among those of all pools, one pool after the other."""
    columns, start = {}, 0
    for name, size in pools.items():
        columns[name] = slice(start, start + size)
        start += size
    return columns


def group_sources(
    groups: Sequence[ExpertGroup], pools: Mapping[str, int], rows: Mapping[str, ExpertGroupRow]
) -> tuple[GroupSource, ...]:
    """The source of every group. ``rows``: the config's [experts.partition], by group. A row without ``source`` takes the pool if there is
    but one, else the one of the group's name.

    Raises:
        ValueError: a source that is no pool, or groups whose sizes do not fit their pools.
    """
    sources = []
    for group in groups:
        row, where = rows.get(group.name), f"experts.partition.{group.name}"
        pool = row.source if row is not None and row.source is not None else None
        if pool is None:
            pool = next(iter(pools)) if len(pools) == 1 else group.name
        copy = row is not None and row.copy
        if pool not in pools:
            given = "got none" if row is None or row.source is None else f"got {row.source!r}"
            raise ValueError(
                f"{where}.source: must be a group of the checkpoint, {' or '.join(pools)}, {given}"
            )
        if copy and group.num_experts != pools[pool]:
            raise ValueError(
                f"{where}.num_experts: a copy holds all {pools[pool]} experts of the checkpoint's group {pool!r}, got "
                f"{group.num_experts}; set it to {pools[pool]}, or divide the group with copy = false"
            )
        sources.append(GroupSource(pool, copy))
    _check_sums(groups, pools, sources)
    return tuple(sources)


def _check_sums(
    groups: Sequence[ExpertGroup], pools: Mapping[str, int], sources: Sequence[GroupSource]
) -> None:
    for pool, size in pools.items():
        parts = [g for g, s in zip(groups, sources, strict=True) if s == GroupSource(pool)]
        held = sum(group.num_experts for group in parts)
        if held != size:
            names = ", ".join(group.name for group in parts) or "no group"
            raise ValueError(
                f"experts.partition: the groups that divide the checkpoint's group {pool!r} ({names}) hold {held} experts, but it has "
                f"{size}; change num_experts of one of them by {size - held:+d}"
            )


def shares_of_pools(sources: Sequence[GroupSource]) -> Iterator[tuple[str, list[int]]]:
    """(pool, indices of groups that together hold every one of its experts once): those that divide it, and every copy alone."""
    for pool in dict.fromkeys(source.pool for source in sources):
        dividing = [i for i, source in enumerate(sources) if source == GroupSource(pool)]
        if dividing:
            yield pool, dividing
        yield from (
            (pool, [i]) for i, source in enumerate(sources) if source.pool == pool and source.copy
        )
