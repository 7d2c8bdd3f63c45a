"""Plans and conversions as text, for those who made them."""

from collections.abc import Iterator, Mapping, Sequence

from symbiotic_titan.partition.conversion import Conversion
from symbiotic_titan.partition.plan import (
    PARTITION_RULES,
    KeptMass,
    Plan,
)
from symbiotic_titan.weights.compatibility import part_of
from symbiotic_titan.weights.reader import TensorKind


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def kept_table(plan: Plan, kept: list[KeptMass]) -> str:
    """What a plan keeps of each modality's routing."""
    groups = " + ".join(f"{group.name} {group.num_experts}" for group in plan.groups)
    lines = [
        f"{groups} experts in {len(plan.layers)} layers by the rule {plan.rule!r}\n",
        "routed mass that stays inside the modality's group",
    ]
    for row in kept:
        where = f" ({row.worst_layer})" if row.worst_layer else ""
        lines.append(
            f"  {row.modality:5s} mean over layers {percent(row.mean):>8s}   worst {percent(row.worst):>8s}{where}"
            f"   by lot {percent(row.by_lot):>8s}"
        )
    return "\n".join(lines)


def better_by_lot(kept: list[KeptMass]) -> str | None:
    """A warning where a plan keeps less than chance, else None."""
    worse = [row.modality for row in kept if row.mean is not None and row.mean < row.by_lot]
    if not worse:
        return None
    return (
        f"a split by lot would keep more of {', '.join(worse)}; try another --rule: "
        f"{', '.join(PARTITION_RULES)}"
    )


def conversion_table(conversion: Conversion) -> str:
    """Copied tensors by the part of the model they are in, others by name; then the parameters before and after."""
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


def step_zero_table(
    columns: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, float],
    layers: Sequence[str],
    inside: Mapping[str, Sequence[float]],
    equal: Mapping[str, Sequence[float]],
) -> str:
    """A partitioned model before its first step: the fields of a StepZeroReport."""
    lines = ["  " + " " * 22 + "".join(name.rjust(14) for name in columns) + "    difference"]
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        cells = "".join(f"{values[name]:14.4f}" for values in columns.values())
        end = f"{100 * differences[name]:+12.2f} %" if name in differences else ""
        lines.append(f"  {name:22s}{cells}{end}")
    for what, shares in (
        ("whose top-k stays inside the group", inside),
        ("for which a layer gives the original's bits for its input (first batch)", equal),
    ):
        if shares:
            lines += [f"\nshare of tokens {what}", *_shares_by_layer(layers, shares)]
    return "\n".join(lines)


def _shares_by_layer(layers: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Iterator[str]:
    rows = [(layer, [values[i] for values in shares.values()]) for i, layer in enumerate(layers)]
    rows.append(("mean", [sum(values) / len(values) for values in shares.values()]))
    for label, row in rows:
        cells = "  ".join(f"{n} {percent(v):>8s}" for n, v in zip(shares, row, strict=True))
        yield f"  {label:10s} {cells}"


def parts_table(kinds: Mapping[str, TensorKind]) -> str:
    """Tensors and parameters of each part of a model."""
    lines: dict[tuple[str, str], list[int]] = {}
    for name, kind in kinds.items():
        line = lines.setdefault(("", part_of(name) + ".*"), [0, 0])
        line[0] += 1
        line[1] += kind.num_values
    return _table(lines)


def _table(lines: Mapping[tuple[str, str], list[int]]) -> str:
    """(kind, name) -> tensors, parameters."""
    first, second = (max(len(key[i]) for key in lines) for i in (0, 1))
    return "\n".join(
        f"  {what:{first + bool(first)}s}{name:{second}s}  x {tensors:<5d}{parameters:>16,}"
        for (what, name), (tensors, parameters) in lines.items()
    )
