"""[[data.stages]]: weights of the sources, and learning rates of parameter groups, that change at given steps of a run."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from symbiotic_titan.config.rows import NOT_NEGATIVE, STEPS, row_from_dict

MixtureBy = Literal["samples", "tokens"]
"""What the weights of the sources are shares of."""

Weights = dict[str, float]
"""Source -> weight."""


@dataclass
class Stage:
    """One row of [[data.stages]]. What it does not name stays as it was in the stage before."""

    from_step: Annotated[int, STEPS]
    """First training step of the stage, counted from 1 as the console prints steps; at least 2, since [[data.sources]] says what
    holds from step 1."""

    weights: Annotated[dict[str, float], NOT_NEGATIVE] = field(default_factory=dict)
    """Source -> its weight from this step on. A source that is not named keeps the weight it had; 0 pauses a source, which goes on
    where it was when it gets a positive weight again."""

    lr: Annotated[dict[str, float], NOT_NEGATIVE] = field(default_factory=dict)
    """Group of [[optimizer.param_groups]] -> its learning rate from this step on, instead of the group's ``lr``. Warm-up and decay
    of the group go on as they are: they multiply the new rate. A group that is not named keeps its rate."""


def stage_rows(rows: list[Any], sources: Weights) -> list[Stage]:
    """The rows of [[data.stages]], checked against the weights of [[data.sources]].

    Raises:
        ValueError: a key or type is wrong, the steps do not increase, a source is unknown, or no source would have a positive weight.
    """
    stages = [row_from_dict(Stage, row, f"[[data.stages]] #{i}") for i, row in enumerate(rows, 1)]
    last = 1
    for i, stage in enumerate(stages, start=1):
        where = f"[[data.stages]] #{i}"
        if stage.from_step <= last:
            rule = (
                "must be at least 2, [[data.sources]] has the weights from step 1 on"
                if i == 1
                else f"must be above {last}, the from_step of the stage before; sort the stages by their first steps"
            )
            raise ValueError(f"{where}.from_step: {rule}, got {stage.from_step}")
        last = stage.from_step
        if not stage.weights and not stage.lr:
            raise ValueError(f"{where}: changes nothing; give it weights or lr, or remove it")
        for name in stage.weights:
            if name not in sources:
                raise ValueError(
                    f"{where}.weights: no source is named {name!r}; choose from {', '.join(sources)}"
                )
    for i, (_, weights) in enumerate(weights_by_stage(sources, stages)[1:], start=1):
        if not sum(weights.values()) > 0:
            raise ValueError(
                f"[[data.stages]] #{i}: the weights of all sources are zero from here on; give at least one source a positive weight"
            )
    return stages


def weights_by_stage(sources: Weights, stages: list[Stage]) -> list[tuple[int, Weights]]:
    """(first step, weights of all sources) of each stage, beginning with step 1 and the weights of [[data.sources]]."""
    found = [(1, sources)]
    for stage in stages:
        found.append((stage.from_step, found[-1][1] | stage.weights))
    return found


def rates_by_stage(stages: list[Stage]) -> dict[str, list[tuple[int, float]]]:
    """Parameter group -> (first step, learning rate) of each stage that names it."""
    rates: dict[str, list[tuple[int, float]]] = {}
    for stage in stages:
        for group, rate in stage.lr.items():
            rates.setdefault(group, []).append((stage.from_step, rate))
    return rates
